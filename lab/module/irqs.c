// SPDX-License-Identifier: GPL-2.0-only
/*
 * Interrupts, each an eventfd: INTx (level, masked when it is sent), MSI-X with
 * four vectors, the error of a broken device, and the request to let go of it.
 */
#include <linux/eventfd.h>

#include "limosa.h"

/* Where an index has its vectors in limosa_dev::vectors, and how many */
static unsigned int limosa_vectors(unsigned int index, unsigned int *first)
{
	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX:
		*first = 0;
		return LIMOSA_VECTORS_INTX;
	case VFIO_PCI_MSIX_IRQ_INDEX:
		*first = LIMOSA_VECTORS_INTX;
		return LIMOSA_VECTORS_MSIX;
	case VFIO_PCI_ERR_IRQ_INDEX:
		*first = LIMOSA_VECTORS_INTX + LIMOSA_VECTORS_MSIX;
		return 1;
	case VFIO_PCI_REQ_IRQ_INDEX:
		*first = LIMOSA_VECTORS_INTX + LIMOSA_VECTORS_MSIX + 1;
		return 1;
	default:
		return 0;
	}
}

static void limosa_signal(struct limosa_dev *dev, unsigned int vector)
{
	if (dev->vectors[vector])
		eventfd_signal(dev->vectors[vector]);
}

void limosa_raise(struct limosa_dev *dev, unsigned int index, unsigned int vector)
{
	unsigned int first;

	lockdep_assert_held(&dev->lock);
	if (vector >= limosa_vectors(index, &first))
		return;
	if (index != VFIO_PCI_INTX_IRQ_INDEX) {
		limosa_signal(dev, first + vector);
	} else if (dev->intx_masked) {
		dev->intx_pending = true;
	} else if (dev->vectors[first]) {
		dev->intx_masked = true;
		limosa_signal(dev, first);
	}
}

int limosa_irq_info(struct vfio_irq_info *info)
{
	unsigned int first;

	if (info->index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info->count = limosa_vectors(info->index, &first);
	info->flags = info->count ? VFIO_IRQ_INFO_EVENTFD : 0;
	if (info->index == VFIO_PCI_INTX_IRQ_INDEX)
		info->flags |= VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
	else if (info->count)
		info->flags |= VFIO_IRQ_INFO_NORESIZE;
	return 0;
}

static void limosa_vector_put(struct limosa_dev *dev, unsigned int vector)
{
	if (dev->vectors[vector])
		eventfd_ctx_put(dev->vectors[vector]);
	dev->vectors[vector] = NULL;
}

/* A new eventfd, or none with -1 */
static int limosa_vector_set(struct limosa_dev *dev, unsigned int vector, int fd)
{
	struct eventfd_ctx *ctx = NULL;

	if (fd >= 0) {
		ctx = eventfd_ctx_fdget(fd);
		if (IS_ERR(ctx))
			return PTR_ERR(ctx);
	} else if (fd != -1) {
		return -EBADF;
	}
	limosa_vector_put(dev, vector);
	dev->vectors[vector] = ctx;
	return 0;
}

static int limosa_irqs_trigger(struct limosa_dev *dev, const struct vfio_irq_set *set, void *data)
{
	unsigned int first, count, i;
	int ret;

	count = limosa_vectors(set->index, &first);
	/* Nothing of nothing takes all of them down */
	if ((set->flags & VFIO_IRQ_SET_DATA_NONE) && !set->count) {
		for (i = 0; i < count; i++)
			limosa_vector_put(dev, first + i);
		if (set->index == VFIO_PCI_INTX_IRQ_INDEX) {
			dev->intx_masked = false;
			dev->intx_pending = false;
		}
		return 0;
	}

	for (i = 0; i < set->count; i++) {
		if (set->flags & VFIO_IRQ_SET_DATA_EVENTFD) {
			ret = limosa_vector_set(dev, first + set->start + i, ((s32 *)data)[i]);
			if (ret)
				return ret;
		} else if ((set->flags & VFIO_IRQ_SET_DATA_NONE) || ((u8 *)data)[i]) {
			limosa_raise(dev, set->index, set->start + i);
		}
	}
	return 0;
}

static int limosa_intx_mask(struct limosa_dev *dev, const struct vfio_irq_set *set, void *data,
			    bool mask)
{
	if (set->index != VFIO_PCI_INTX_IRQ_INDEX)
		return -ENOTTY;
	if (set->count != 1)
		return -EINVAL;
	if (set->flags & VFIO_IRQ_SET_DATA_EVENTFD)
		return -ENOTTY;
	if ((set->flags & VFIO_IRQ_SET_DATA_BOOL) && !*(u8 *)data)
		return 0;

	dev->intx_masked = mask;
	if (!mask && dev->intx_pending) {
		dev->intx_pending = false;
		limosa_raise(dev, VFIO_PCI_INTX_IRQ_INDEX, 0);
	}
	return 0;
}

int limosa_irqs_set(struct limosa_dev *dev, const struct vfio_irq_set *set, void *data)
{
	guard(mutex)(&dev->lock);
	switch (set->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) {
	case VFIO_IRQ_SET_ACTION_TRIGGER:
		return limosa_irqs_trigger(dev, set, data);
	case VFIO_IRQ_SET_ACTION_MASK:
		return limosa_intx_mask(dev, set, data, true);
	case VFIO_IRQ_SET_ACTION_UNMASK:
		return limosa_intx_mask(dev, set, data, false);
	default:
		return -EINVAL;
	}
}

void limosa_irqs_release(struct limosa_dev *dev)
{
	unsigned int i;

	lockdep_assert_held(&dev->lock);
	for (i = 0; i < LIMOSA_VECTORS; i++)
		limosa_vector_put(dev, i);
	dev->intx_masked = false;
	dev->intx_pending = false;
}

/* Somebody wants to remove the device and waits for its user to close it */
void limosa_request(struct vfio_device *vdev, unsigned int count)
{
	struct limosa_dev *dev = to_limosa(vdev);

	guard(mutex)(&dev->lock);
	limosa_raise(dev, VFIO_PCI_REQ_IRQ_INDEX, 0);
}
