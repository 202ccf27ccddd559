// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device's state: blocks that are generated, registers, and BAR2's memory.
 */
#include <linux/bitmap.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "limosa.h"

static u64 limosa_fold(u64 hash, u64 word)
{
	return limosa_mix(hash ^ word);
}

static u64 limosa_fold_words(u64 hash, const void *data, size_t bytes)
{
	const __le64 *word = data;

	for (; bytes >= sizeof(*word); bytes -= sizeof(*word))
		hash = limosa_fold(hash, le64_to_cpu(*word++));
	return hash;
}

/* Word w of a block is mix(base + w) */
static u64 limosa_block_base(u64 seed, u32 block, u32 generation)
{
	return limosa_mix(seed + limosa_mix((u64)block << 32 | generation));
}

void limosa_block_fill(void *to, u32 length, u64 seed, u32 block, u32 generation)
{
	u64 base = limosa_block_base(seed, block, generation);
	__le64 *word = to;
	u32 i;

	for (i = 0; i < length / sizeof(*word); i++)
		word[i] = cpu_to_le64(limosa_mix(base + i));
}

bool limosa_block_equals(const void *from, u32 length, u64 seed, u32 block, u32 generation)
{
	u64 base = limosa_block_base(seed, block, generation);
	const __le64 *word = from;
	u32 i;

	for (i = 0; i < length / sizeof(*word); i++) {
		if (le64_to_cpu(word[i]) != limosa_mix(base + i))
			return false;
	}
	return true;
}

/* All blocks are of one size, but the last may be shorter */
u32 limosa_block_length(struct limosa_dev *dev, u32 block)
{
	return min_t(u64, dev->block_bytes, dev->state_bytes - (u64)block * dev->block_bytes);
}

/* A block's bytes prove themselves; of other records the payload is summed up too */
u64 limosa_record_check(const struct limosa_record *record, const void *payload)
{
	u64 hash = limosa_fold_words(LIMOSA_MAGIC, record, offsetof(struct limosa_record, check));

	if (le32_to_cpu(record->kind) != LIMOSA_RECORD_BLOCK)
		hash = limosa_fold_words(hash, payload, le32_to_cpu(record->length));
	return hash;
}

u64 limosa_header_check(const struct limosa_header *header)
{
	return limosa_fold_words(LIMOSA_MAGIC, header, offsetof(struct limosa_header, check));
}

/* One number for the whole state: two devices that answer the same hold the same */
u64 limosa_content_check(struct limosa_dev *dev, const struct limosa_content *content)
{
	const u64 *registers = (const u64 *)&content->registers;
	u64 hash = limosa_fold(dev->state_bytes, dev->block_bytes);
	u32 i;

	for (i = 0; i < dev->blocks; i++)
		hash = limosa_fold(hash, content->generations[i]);
	for (i = 0; i < LIMOSA_REGISTERS; i++)
		hash = limosa_fold(hash, registers[i]);
	return limosa_fold_words(hash, content->memory, LIMOSA_MEMORY_BYTES);
}

int limosa_content_resize(struct limosa_dev *dev, u64 state_bytes, u32 block_bytes)
{
	u32 *generations;
	u64 blocks;

	if (!is_power_of_2(block_bytes) || block_bytes < LIMOSA_BLOCK_BYTES_MIN ||
	    block_bytes > LIMOSA_BLOCK_BYTES_MAX)
		return -EINVAL;
	if (!state_bytes || !IS_ALIGNED(state_bytes, sizeof(u64)))
		return -EINVAL;
	/* Not rounded up by an addition: a size near 2^64 is a size too */
	blocks = (state_bytes - 1) / block_bytes + 1;
	if (blocks > LIMOSA_BLOCKS_MAX)
		return -EFBIG;

	generations = kvcalloc(blocks, sizeof(*generations), GFP_KERNEL);
	if (!generations)
		return -ENOMEM;

	kvfree(dev->content.generations);
	dev->content.generations = generations;
	dev->state_bytes = state_bytes;
	dev->block_bytes = block_bytes;
	dev->blocks = blocks;
	limosa_content_clear(dev);
	return 0;
}

/* As after power-on */
void limosa_content_clear(struct limosa_dev *dev)
{
	memset(dev->content.generations, 0, dev->blocks * sizeof(*dev->content.generations));
	memset(&dev->content.registers, 0, sizeof(dev->content.registers));
	memset(dev->content.memory, 0, LIMOSA_MEMORY_BYTES);
}

/* Changes the next @blocks blocks, in the order of their numbers, round and round */
void limosa_dirty(struct limosa_dev *dev, u64 blocks)
{
	struct limosa_registers *registers = &dev->content.registers;
	u32 block;

	lockdep_assert_held(&dev->lock);
	/* More than all would only change all again */
	for (blocks = min_t(u64, blocks, dev->blocks); blocks; blocks--) {
		block = registers->cursor % dev->blocks;
		registers->cursor = (block + 1) % dev->blocks;
		dev->content.generations[block]++;
		dev->dirtied++;
		if (dev->session)
			limosa_save_changed(dev->session, block);
	}
	wake_up_all(&dev->wait);
}

/* Changes every block */
void limosa_reseed(struct limosa_dev *dev, u64 seed)
{
	u32 block;

	lockdep_assert_held(&dev->lock);
	dev->content.registers.seed = seed;
	dev->dirtied += dev->blocks;
	for (block = 0; dev->session && block < dev->blocks; block++)
		limosa_save_changed(dev->session, block);
	wake_up_all(&dev->wait);
}
