// SPDX-License-Identifier: GPL-2.0-only
/*
 * DMA logging: which granules of the user's address space the DMA engine has
 * written since it was last asked. include/uapi/linux/vfio.h,
 * VFIO_DEVICE_FEATURE_DMA_LOGGING_*.
 */
#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "limosa.h"

#define LIMOSA_LOG_PAGE_MIN	SZ_4K
#define LIMOSA_LOG_PAGE_MAX	SZ_1G

/* The page size asked for is a hint */
static u64 limosa_log_page(struct limosa_dev *dev, u64 asked)
{
	if (dev->log_page_bytes)
		return dev->log_page_bytes;
	if (!is_power_of_2(asked))
		return LIMOSA_LOG_PAGE_MIN;
	return clamp_t(u64, asked, LIMOSA_LOG_PAGE_MIN, LIMOSA_LOG_PAGE_MAX);
}

void limosa_log_end(struct limosa_dev *dev)
{
	lockdep_assert_held(&dev->dma_lock);
	dev->logging = false;
	dev->log_error = 0;
	xa_destroy(&dev->log);
	kvfree(dev->log_ranges);
	dev->log_ranges = NULL;
	dev->log_ranges_count = 0;
}

static int limosa_log_begin(struct limosa_dev *dev, struct rb_root_cached *ranges, u32 count,
			    u64 *page_size)
{
	struct interval_tree_node *node;
	u32 at = 0;

	if (dev->logging)
		return -EBUSY;
	/* More ranges than the device has room for become fewer and wider ones */
	if (dev->log_ranges_max && count > dev->log_ranges_max) {
		vfio_combine_iova_ranges(ranges, count, dev->log_ranges_max);
		count = dev->log_ranges_max;
	}
	dev->log_ranges = kvmalloc_array(count, sizeof(*dev->log_ranges), GFP_KERNEL_ACCOUNT);
	if (!dev->log_ranges)
		return -ENOMEM;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node && at < count;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		dev->log_ranges[at].start = node->start;
		dev->log_ranges[at++].last = node->last;
	}
	dev->log_ranges_count = at;
	*page_size = limosa_log_page(dev, *page_size);
	dev->log_shift = ilog2(*page_size);
	dev->log_error = 0;
	dev->logging = true;
	return 0;
}

static int limosa_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes,
			    u64 *page_size)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_START };
	struct limosa_dev *dev = to_limosa(vdev);
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;
	guard(mutex)(&dev->dma_lock);
	return limosa_log_begin(dev, ranges, nnodes, page_size);
}

static int limosa_log_stop(struct vfio_device *vdev)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_STOP };
	struct limosa_dev *dev = to_limosa(vdev);
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;
	guard(mutex)(&dev->dma_lock);
	limosa_log_end(dev);
	return 0;
}

static bool limosa_log_covers(struct limosa_dev *dev, unsigned long start, unsigned long last)
{
	u32 i;

	for (i = 0; i < dev->log_ranges_count; i++) {
		if (dev->log_ranges[i].start <= last && dev->log_ranges[i].last >= start)
			return true;
	}
	return false;
}

void limosa_log_written(struct limosa_dev *dev, u64 iova, u64 length)
{
	unsigned long granule;
	int ret;

	lockdep_assert_held(&dev->dma_lock);
	if (!dev->logging || !limosa_log_covers(dev, iova, iova + length - 1))
		return;
	for (granule = iova >> dev->log_shift; granule <= (iova + length - 1) >> dev->log_shift;
	     granule++) {
		ret = xa_err(xa_store(&dev->log, granule, xa_mk_value(1), GFP_KERNEL));
		/* The log has a hole and says so until it is started anew */
		if (ret)
			dev->log_error = ret;
	}
}

static int limosa_log_read_and_clear(struct vfio_device *vdev, unsigned long iova,
				     unsigned long length, struct iova_bitmap *dirty)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_REPORT };
	struct limosa_dev *dev = to_limosa(vdev);
	unsigned long granule, start, end, last;
	void *entry;
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;
	guard(mutex)(&dev->dma_lock);
	if (!dev->logging)
		return -EINVAL;
	if (dev->log_error)
		return dev->log_error;
	if (!length)
		return 0;

	last = iova + length - 1;
	xa_for_each_range(&dev->log, granule, entry, iova >> dev->log_shift,
			  last >> dev->log_shift) {
		start = granule << dev->log_shift;
		end = start + (1UL << dev->log_shift) - 1;
		iova_bitmap_set(dirty, max(start, iova), min(end, last) - max(start, iova) + 1);
		/* A granule that sticks out was not reported as a whole */
		if (start >= iova && end <= last)
			xa_erase(&dev->log, granule);
	}
	return 0;
}

const struct vfio_log_ops limosa_log_ops = {
	.log_start = limosa_log_start,
	.log_stop = limosa_log_stop,
	.log_read_and_clear = limosa_log_read_and_clear,
};
