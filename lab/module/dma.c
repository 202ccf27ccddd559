// SPDX-License-Identifier: GPL-2.0-only
/*
 * The DMA engine: writes a pattern into its user's memory, or reads memory and
 * sums it up, through pinned pages or through vfio_dma_rw().
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "limosa.h"

/* What one command is to do; a copy, since its user may write registers meanwhile */
struct limosa_dma {
	u64 command;
	u64 iova;
	u64 bytes;
	u64 seed;
	u64 check;
	u64 pages;
};

/* The word at an IOVA follows from the IOVA, so that pages cannot be confused */
static void limosa_dma_words(struct limosa_dma *dma, __le64 *words, u64 iova, u32 bytes)
{
	u32 i;

	for (i = 0; i < bytes / sizeof(*words); i++) {
		if ((dma->command & LIMOSA_DMA_WHAT) == LIMOSA_DMA_WRITE)
			words[i] = cpu_to_le64(limosa_mix(dma->seed + iova + i * sizeof(*words)));
		else
			dma->check = limosa_mix(dma->check ^ le64_to_cpu(words[i]));
	}
}

static int limosa_dma_by_cpu(struct limosa_dev *dev, struct limosa_dma *dma, u64 iova, u32 bytes)
{
	bool write = (dma->command & LIMOSA_DMA_WHAT) == LIMOSA_DMA_WRITE;
	void *words;
	int ret;

	words = kmalloc(PAGE_SIZE, GFP_KERNEL);
	if (!words)
		return -ENOMEM;
	if (write)
		limosa_dma_words(dma, words, iova, bytes);
	ret = vfio_dma_rw(&dev->vdev, iova, words, bytes, write);
	if (!ret && !write)
		limosa_dma_words(dma, words, iova, bytes);
	kfree(words);
	return ret;
}

/*
 * What a page that is left pinned may be used for: as many marks as there are
 * ways to pin it. A page that was pinned to be read may be one that its user
 * must not write, a zero page or a file's that was opened read-only.
 */
#define LIMOSA_PIN_READ		XA_MARK_0
#define LIMOSA_PIN_WRITE	XA_MARK_1

/*
 * One page at a time: iommufd wants pages unpinned in the ranges in which they
 * were pinned, and an unmap may want any of them. What the user has not mapped
 * for such an access is refused by the kernel when it is pinned.
 */
static int limosa_dma_pinned(struct limosa_dev *dev, struct limosa_dma *dma, u64 iova, u32 bytes)
{
	bool write = (dma->command & LIMOSA_DMA_WHAT) == LIMOSA_DMA_WRITE;
	xa_mark_t mark = write ? LIMOSA_PIN_WRITE : LIMOSA_PIN_READ;
	u64 base = ALIGN_DOWN(iova, PAGE_SIZE);
	unsigned long index = base >> PAGE_SHIFT;
	struct page *page, *kept;
	bool pinned;
	void *at;
	int ret;

	page = kept = xa_load(&dev->pins, index);
	pinned = !kept || !xa_get_mark(&dev->pins, index, mark);
	if (pinned) {
		ret = vfio_pin_pages(&dev->vdev, base, 1, write ? IOMMU_WRITE : IOMMU_READ, &page);
		if (ret != 1)
			return ret < 0 ? ret : -EFAULT;
	}

	at = kmap_local_page(page);
	limosa_dma_words(dma, at + offset_in_page(iova), iova, bytes);
	kunmap_local(at);
	if (write)
		flush_dcache_page(page);

	ret = 0;
	if (!kept && (dma->command & LIMOSA_DMA_KEEP)) {
		ret = xa_err(xa_store(&dev->pins, index, page, GFP_KERNEL));
		if (!ret) {
			xa_set_mark(&dev->pins, index, mark);
			WRITE_ONCE(dev->pinned, dev->pinned + 1);
			pinned = false;
		}
	} else if (kept == page && pinned) {
		/* The same page, now known to be fit for this as well */
		xa_set_mark(&dev->pins, index, mark);
	}
	if (pinned)
		vfio_unpin_pages(&dev->vdev, base, 1);
	return ret;
}

static int limosa_dma_move(struct limosa_dev *dev, struct limosa_dma *dma)
{
	u64 iova = dma->iova, left = dma->bytes;
	u32 bytes;
	int ret;

	if (!left || left > LIMOSA_DMA_BYTES_MAX || iova + left - 1 < iova ||
	    !IS_ALIGNED(iova | left, sizeof(u64)))
		return -EINVAL;

	while (left) {
		if (fatal_signal_pending(current))
			return -EINTR;
		bytes = min_t(u64, left, PAGE_SIZE - offset_in_page(iova));
		if (dma->command & LIMOSA_DMA_BY_CPU)
			ret = limosa_dma_by_cpu(dev, dma, iova, bytes);
		else
			ret = limosa_dma_pinned(dev, dma, iova, bytes);
		if (ret)
			return ret;
		/* Logged after it is written: a report between the two would lose it */
		if ((dma->command & LIMOSA_DMA_WHAT) == LIMOSA_DMA_WRITE)
			limosa_log_written(dev, iova, bytes);
		dma->pages++;
		iova += bytes;
		left -= bytes;
		cond_resched();
	}
	return 0;
}

/* Obeys the command that waits, if the device is in a state to */
void limosa_dma_run(struct limosa_dev *dev)
{
	struct limosa_registers *registers = &dev->content.registers;
	struct limosa_dma dma;
	int ret;

	lockdep_assert_held(&dev->dma_lock);
	mutex_lock(&dev->lock);
	if (!registers->dma_command || !limosa_may_dma(dev->state) || dev->gone) {
		mutex_unlock(&dev->lock);
		return;
	}
	dma = (struct limosa_dma){
		.command = registers->dma_command,
		.iova = registers->dma_iova,
		.bytes = registers->dma_bytes,
		.seed = registers->dma_seed,
	};
	registers->dma_command = 0;
	mutex_unlock(&dev->lock);

	switch (dma.command & LIMOSA_DMA_WHAT) {
	case LIMOSA_DMA_WRITE:
	case LIMOSA_DMA_READ:
		ret = limosa_dma_move(dev, &dma);
		break;
	case LIMOSA_DMA_UNPIN:
		limosa_dma_unpin_all(dev);
		ret = 0;
		break;
	default:
		ret = -EINVAL;
		break;
	}

	mutex_lock(&dev->lock);
	registers->dma_status = ret;
	registers->dma_check = dma.check;
	registers->dma_pages += dma.pages;
	if (dev->vectors[LIMOSA_VECTORS_INTX])
		limosa_raise(dev, VFIO_PCI_MSIX_IRQ_INDEX, 0);
	else
		limosa_raise(dev, VFIO_PCI_INTX_IRQ_INDEX, 0);
	mutex_unlock(&dev->lock);
}

static void limosa_dma_unpin(struct limosa_dev *dev, unsigned long first, unsigned long last)
{
	struct page *page;
	unsigned long at;

	lockdep_assert_held(&dev->dma_lock);
	xa_for_each_range(&dev->pins, at, page, first, last) {
		vfio_unpin_pages(&dev->vdev, (dma_addr_t)at << PAGE_SHIFT, 1);
		xa_erase(&dev->pins, at);
		WRITE_ONCE(dev->pinned, dev->pinned - 1);
	}
}

void limosa_dma_unpin_all(struct limosa_dev *dev)
{
	limosa_dma_unpin(dev, 0, ULONG_MAX);
}

/* The memory goes away: let go of it. When this returns there is no DMA to it. */
void limosa_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	struct limosa_dev *dev = to_limosa(vdev);
	u64 last = iova + length - 1;

	if (!length)
		return;
	if (last < iova)
		last = U64_MAX;
	guard(mutex)(&dev->dma_lock);
	limosa_dma_unpin(dev, iova >> PAGE_SHIFT, last >> PAGE_SHIFT);
}
