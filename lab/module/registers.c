// SPDX-License-Identifier: GPL-2.0-only
/*
 * BAR0: the registers. Most of them are part of the device's state.
 */
#include <linux/unaligned.h>

#include "limosa.h"

/* BAR0: registers of 64 bits, for accesses of 4 or 8 bytes */
enum limosa_register {
	LIMOSA_REG_ID = 0x00,
	LIMOSA_REG_VERSION = 0x08,
	LIMOSA_REG_STATE = 0x10,
	LIMOSA_REG_STATE_BYTES = 0x18,
	LIMOSA_REG_BLOCK_BYTES = 0x20,
	LIMOSA_REG_BLOCKS = 0x28,
	LIMOSA_REG_CHECK = 0x30,
	LIMOSA_REG_SEED = 0x38,
	LIMOSA_REG_CURSOR = 0x40,
	LIMOSA_REG_DIRTY = 0x48,
	LIMOSA_REG_DIRTIED = 0x50,
	LIMOSA_REG_IRQ = 0x58,
	LIMOSA_REG_DMA_IOVA = 0x60,
	LIMOSA_REG_DMA_BYTES = 0x68,
	LIMOSA_REG_DMA_SEED = 0x70,
	LIMOSA_REG_DMA_COMMAND = 0x78,
	LIMOSA_REG_DMA_STATUS = 0x80,
	LIMOSA_REG_DMA_CHECK = 0x88,
	LIMOSA_REG_DMA_PAGES = 0x90,
	LIMOSA_REG_PINNED = 0x98,
	LIMOSA_REG_SCRATCH = 0xc0,
	LIMOSA_REG_SCRATCH_LAST = LIMOSA_REG_SCRATCH + (LIMOSA_SCRATCHES - 1) * sizeof(u64),
};

static u64 limosa_register_get(struct limosa_dev *dev, u32 at)
{
	const struct limosa_registers *registers = &dev->content.registers;

	lockdep_assert_held(&dev->lock);
	switch (at) {
	case LIMOSA_REG_ID:
		return LIMOSA_MAGIC;
	case LIMOSA_REG_VERSION:
		return LIMOSA_VERSION;
	case LIMOSA_REG_STATE:
		return dev->state;
	case LIMOSA_REG_STATE_BYTES:
		return dev->state_bytes;
	case LIMOSA_REG_BLOCK_BYTES:
		return dev->block_bytes;
	case LIMOSA_REG_BLOCKS:
		return dev->blocks;
	case LIMOSA_REG_CHECK:
		return limosa_content_check(dev, &dev->content);
	case LIMOSA_REG_SEED:
		return registers->seed;
	case LIMOSA_REG_CURSOR:
		return registers->cursor;
	case LIMOSA_REG_DIRTIED:
		return dev->dirtied;
	case LIMOSA_REG_DMA_IOVA:
		return registers->dma_iova;
	case LIMOSA_REG_DMA_BYTES:
		return registers->dma_bytes;
	case LIMOSA_REG_DMA_SEED:
		return registers->dma_seed;
	case LIMOSA_REG_DMA_COMMAND:
		return registers->dma_command;
	case LIMOSA_REG_DMA_STATUS:
		return registers->dma_status;
	case LIMOSA_REG_DMA_CHECK:
		return registers->dma_check;
	case LIMOSA_REG_DMA_PAGES:
		return registers->dma_pages;
	case LIMOSA_REG_PINNED:
		return READ_ONCE(dev->pinned);
	case LIMOSA_REG_SCRATCH ... LIMOSA_REG_SCRATCH_LAST:
		return registers->scratch[(at - LIMOSA_REG_SCRATCH) / sizeof(u64)];
	default:
		return 0;
	}
}

/* True if there is DMA to be done. Read-only registers and holes take no notice. */
static bool limosa_register_set(struct limosa_dev *dev, u32 at, u64 value)
{
	struct limosa_registers *registers = &dev->content.registers;

	lockdep_assert_held(&dev->lock);
	switch (at) {
	case LIMOSA_REG_SEED:
		limosa_reseed(dev, value);
		break;
	case LIMOSA_REG_CURSOR:
		registers->cursor = value % dev->blocks;
		break;
	case LIMOSA_REG_DIRTY:
		limosa_dirty(dev, value);
		break;
	case LIMOSA_REG_IRQ:
		limosa_raise(dev, value >> 32, value);
		break;
	case LIMOSA_REG_DMA_IOVA:
		registers->dma_iova = value;
		break;
	case LIMOSA_REG_DMA_BYTES:
		registers->dma_bytes = value;
		break;
	case LIMOSA_REG_DMA_SEED:
		registers->dma_seed = value;
		break;
	case LIMOSA_REG_DMA_COMMAND:
		registers->dma_command = value;
		return value;
	case LIMOSA_REG_SCRATCH ... LIMOSA_REG_SCRATCH_LAST:
		registers->scratch[(at - LIMOSA_REG_SCRATCH) / sizeof(u64)] = value;
		break;
	}
	return false;
}

/* One access of 4 or 8 bytes, naturally aligned */
static void limosa_bar0_access(struct limosa_dev *dev, u32 at, void *data, u32 size, bool write)
{
	u32 whole = at & ~7, half = (at & 4) * BITS_PER_BYTE;
	bool dma = false;
	u64 value;

	mutex_lock(&dev->lock);
	if (!write) {
		value = limosa_register_get(dev, whole);
		if (size == sizeof(u64))
			put_unaligned_le64(value, data);
		else
			put_unaligned_le32(value >> half, data);
	} else if (!limosa_runs(dev->state)) {
		/* A stopped device does not change, whatever its user does */
		dev->ignored++;
	} else if (size == sizeof(u64)) {
		dma = limosa_register_set(dev, whole, get_unaligned_le64(data));
	} else {
		value = limosa_register_get(dev, whole);
		value &= ~((u64)U32_MAX << half);
		value |= (u64)get_unaligned_le32(data) << half;
		dma = limosa_register_set(dev, whole, value);
	}
	mutex_unlock(&dev->lock);

	if (dma) {
		mutex_lock(&dev->dma_lock);
		limosa_dma_run(dev);
		mutex_unlock(&dev->dma_lock);
	}
}

int limosa_bar0(struct limosa_dev *dev, u32 at, u8 *data, size_t count, bool write)
{
	u32 size;

	while (count) {
		if (count >= sizeof(u64) && IS_ALIGNED(at, sizeof(u64)))
			size = sizeof(u64);
		else if (count >= sizeof(u32) && IS_ALIGNED(at, sizeof(u32)))
			size = sizeof(u32);
		else
			return -EINVAL;
		limosa_bar0_access(dev, at, data, size, write);
		at += size;
		data += size;
		count -= size;
	}
	return 0;
}
