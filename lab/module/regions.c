// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device as its user's ioctls and accesses see it: BAR0 with registers,
 * BAR2 with memory that can in part be mapped, and PCI configuration space.
 */
#include <linux/fs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include <linux/vmalloc.h>

#include "limosa.h"

#define LIMOSA_REGION_SHIFT	40
#define LIMOSA_BAR0_BYTES	4096
#define LIMOSA_CONFIG_BYTES	256
#define LIMOSA_CHUNK_BYTES	256

#define LIMOSA_PCI_VENDOR	0x4c69
#define LIMOSA_PCI_DEVICE	0x6d6f
#define LIMOSA_PCI_COMMANDS	(PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE)

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
static int limosa_bar0_access(struct limosa_dev *dev, u32 at, void *data, u32 size, bool write)
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
	return 0;
}

static int limosa_bar0(struct limosa_dev *dev, u32 at, u8 *data, size_t count, bool write)
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

static int limosa_bar2(struct limosa_dev *dev, u32 at, u8 *data, size_t count, bool write)
{
	guard(mutex)(&dev->lock);
	if (!write)
		memcpy(data, dev->content.memory + at, count);
	else if (limosa_runs(dev->state))
		memcpy(dev->content.memory + at, data, count);
	else
		dev->ignored++;
	return 0;
}

/* A configuration space that has all it can from the registers */
static void limosa_config_make(struct limosa_dev *dev, u8 *config)
{
	const struct limosa_registers *registers = &dev->content.registers;

	memset(config, 0, LIMOSA_CONFIG_BYTES);
	put_unaligned_le16(LIMOSA_PCI_VENDOR, config + PCI_VENDOR_ID);
	put_unaligned_le16(LIMOSA_PCI_DEVICE, config + PCI_DEVICE_ID);
	put_unaligned_le16(registers->pci_command, config + PCI_COMMAND);
	config[PCI_REVISION_ID] = LIMOSA_VERSION;
	put_unaligned_le16(PCI_CLASS_MEMORY_OTHER, config + PCI_CLASS_DEVICE);
	put_unaligned_le32(registers->pci_bar0, config + PCI_BASE_ADDRESS_0);
	put_unaligned_le32(registers->pci_bar2, config + PCI_BASE_ADDRESS_2);
	put_unaligned_le16(LIMOSA_PCI_VENDOR, config + PCI_SUBSYSTEM_VENDOR_ID);
	put_unaligned_le16(dev->type->number, config + PCI_SUBSYSTEM_ID);
	config[PCI_INTERRUPT_LINE] = registers->pci_line;
	config[PCI_INTERRUPT_PIN] = 1;
}

/* Open to its user in a stopped device too, as the protocol wants it */
static int limosa_config(struct limosa_dev *dev, u32 at, u8 *data, size_t count, bool write)
{
	struct limosa_registers *registers = &dev->content.registers;
	u8 *config;

	config = kmalloc(LIMOSA_CONFIG_BYTES, GFP_KERNEL);
	if (!config)
		return -ENOMEM;
	mutex_lock(&dev->lock);
	limosa_config_make(dev, config);
	if (write) {
		memcpy(config + at, data, count);
		registers->pci_command = get_unaligned_le16(config + PCI_COMMAND) &
					 LIMOSA_PCI_COMMANDS;
		registers->pci_line = config[PCI_INTERRUPT_LINE];
		registers->pci_bar0 = get_unaligned_le32(config + PCI_BASE_ADDRESS_0) &
				      ~(u32)(LIMOSA_BAR0_BYTES - 1);
		registers->pci_bar2 = get_unaligned_le32(config + PCI_BASE_ADDRESS_2) &
				      ~(u32)(LIMOSA_MEMORY_BYTES - 1);
	} else {
		memcpy(data, config + at, count);
	}
	mutex_unlock(&dev->lock);
	kfree(config);
	return 0;
}

static u64 limosa_region_bytes(unsigned int index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return LIMOSA_BAR0_BYTES;
	case VFIO_PCI_BAR2_REGION_INDEX:
		return LIMOSA_MEMORY_BYTES;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return LIMOSA_CONFIG_BYTES;
	default:
		return 0;
	}
}

static int limosa_chunk(struct limosa_dev *dev, loff_t pos, u8 *data, size_t count, bool write)
{
	u32 at = pos & (BIT_ULL(LIMOSA_REGION_SHIFT) - 1);

	if (READ_ONCE(dev->gone))
		return -ENODEV;
	switch (pos >> LIMOSA_REGION_SHIFT) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return limosa_bar0(dev, at, data, count, write);
	case VFIO_PCI_BAR2_REGION_INDEX:
		return limosa_bar2(dev, at, data, count, write);
	default:
		return limosa_config(dev, at, data, count, write);
	}
}

static ssize_t limosa_access(struct vfio_device *vdev, char __user *to, const char __user *from,
			     size_t count, loff_t *ppos)
{
	u64 bytes = limosa_region_bytes(*ppos >> LIMOSA_REGION_SHIFT);
	u64 at = *ppos & (BIT_ULL(LIMOSA_REGION_SHIFT) - 1);
	struct limosa_dev *dev = to_limosa(vdev);
	u8 data[LIMOSA_CHUNK_BYTES];
	size_t done = 0, chunk;
	int ret;

	if (*ppos < 0 || at >= bytes)
		return -EINVAL;
	count = min_t(u64, count, bytes - at);

	while (done < count) {
		chunk = min_t(size_t, count - done, sizeof(data));
		if (from && copy_from_user(data, from + done, chunk))
			return -EFAULT;
		ret = limosa_chunk(dev, *ppos, data, chunk, from);
		if (ret)
			return ret;
		if (to && copy_to_user(to + done, data, chunk))
			return -EFAULT;
		*ppos += chunk;
		done += chunk;
	}
	return done;
}

static ssize_t limosa_read(struct vfio_device *vdev, char __user *to, size_t count, loff_t *ppos)
{
	return limosa_access(vdev, to, NULL, count, ppos);
}

static ssize_t limosa_write(struct vfio_device *vdev, const char __user *from, size_t count,
			    loff_t *ppos)
{
	return limosa_access(vdev, NULL, from, count, ppos);
}

/* Pages 1 and 3 of BAR2. No lock: the caller holds mmap_lock, which is inner to ours. */
static int limosa_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	unsigned long page = vma->vm_pgoff & (BIT(LIMOSA_REGION_SHIFT - PAGE_SHIFT) - 1);
	unsigned int index = vma->vm_pgoff >> (LIMOSA_REGION_SHIFT - PAGE_SHIFT);
	struct limosa_dev *dev = to_limosa(vdev);

	if (READ_ONCE(dev->gone))
		return -ENODEV;
	if (index != VFIO_PCI_BAR2_REGION_INDEX || page >= LIMOSA_MEMORY_PAGES || !(page & 1) ||
	    vma_pages(vma) != 1 || !(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	return remap_vmalloc_range(vma, dev->content.memory, page);
}

static int limosa_sparse_add(struct vfio_info_cap *caps)
{
	DEFINE_RAW_FLEX(struct vfio_region_info_cap_sparse_mmap, sparse, areas, 2);
	struct vfio_info_cap_header mappable = {
		.id = VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
		.version = 1,
	};
	int ret;

	sparse->header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP;
	sparse->header.version = 1;
	sparse->nr_areas = 2;
	sparse->areas[0].offset = PAGE_SIZE;
	sparse->areas[0].size = PAGE_SIZE;
	sparse->areas[1].offset = 3 * PAGE_SIZE;
	sparse->areas[1].size = PAGE_SIZE;
	ret = vfio_info_add_capability(caps, &sparse->header,
				       struct_size(sparse, areas, sparse->nr_areas));
	/* A second one, so that there is a chain */
	return ret ?: vfio_info_add_capability(caps, &mappable, sizeof(mappable));
}

static int limosa_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
			      struct vfio_info_cap *caps)
{
	if (READ_ONCE(to_limosa(vdev)->gone))
		return -ENODEV;
	if (info->index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;

	info->size = limosa_region_bytes(info->index);
	info->offset = (u64)info->index << LIMOSA_REGION_SHIFT;
	info->flags = info->size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	if (info->index != VFIO_PCI_BAR2_REGION_INDEX)
		return 0;
	info->flags |= VFIO_REGION_INFO_FLAG_MMAP;
	return limosa_sparse_add(caps);
}

#if !LIMOSA_HAVE_REGION_INFO_OP
static long limosa_ioctl_region_info(struct vfio_device *vdev, void __user *arg)
{
	size_t size = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	int ret;

	if (copy_from_user(&info, arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	info.cap_offset = 0;
	ret = limosa_region_info(vdev, &info, &caps);
	if (ret)
		goto out;

	if (caps.size) {
		info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
		if (info.argsz < sizeof(info) + caps.size) {
			info.argsz = sizeof(info) + caps.size;
		} else {
			vfio_info_cap_shift(&caps, sizeof(info));
			info.cap_offset = sizeof(info);
			if (copy_to_user(arg + sizeof(info), caps.buf, caps.size))
				ret = -EFAULT;
		}
	}
	if (!ret && copy_to_user(arg, &info, size))
		ret = -EFAULT;
out:
	kfree(caps.buf);
	return ret;
}
#endif

static long limosa_ioctl_info(void __user *arg)
{
	size_t size = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, size) ? -EFAULT : 0;
}

static long limosa_ioctl_irq_info(void __user *arg)
{
	size_t size = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;
	int ret;

	if (copy_from_user(&info, arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	ret = limosa_irq_info(&info);
	if (ret)
		return ret;
	return copy_to_user(arg, &info, size) ? -EFAULT : 0;
}

static long limosa_ioctl_set_irqs(struct limosa_dev *dev, void __user *arg)
{
	size_t size = offsetofend(struct vfio_irq_set, count), bytes = 0;
	struct vfio_irq_set set;
	struct vfio_irq_info info;
	void *data = NULL;
	int ret;

	if (copy_from_user(&set, arg, size))
		return -EFAULT;
	info.index = set.index;
	ret = limosa_irq_info(&info);
	if (ret)
		return ret;
	ret = vfio_set_irqs_validate_and_prepare(&set, info.count, VFIO_PCI_NUM_IRQS, &bytes);
	if (ret)
		return ret;
	if (bytes) {
		data = memdup_user(arg + size, bytes);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	ret = limosa_irqs_set(dev, &set, data);
	kfree(data);
	return ret;
}

static long limosa_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct limosa_dev *dev = to_limosa(vdev);

	if (READ_ONCE(dev->gone))
		return -ENODEV;
	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return limosa_ioctl_info((void __user *)arg);
#if !LIMOSA_HAVE_REGION_INFO_OP
	case VFIO_DEVICE_GET_REGION_INFO:
		return limosa_ioctl_region_info(vdev, (void __user *)arg);
#endif
	case VFIO_DEVICE_GET_IRQ_INFO:
		return limosa_ioctl_irq_info((void __user *)arg);
	case VFIO_DEVICE_SET_IRQS:
		return limosa_ioctl_set_irqs(dev, (void __user *)arg);
	case VFIO_DEVICE_RESET:
		return limosa_reset(dev);
	default:
		return -ENOTTY;
	}
}

const struct vfio_device_ops limosa_device_ops = {
	.name = "vfio-limosa",
	.init = limosa_init_dev,
	.release = limosa_release_dev,
	.open_device = limosa_open_device,
	.close_device = limosa_close_device,
	.read = limosa_read,
	.write = limosa_write,
	.ioctl = limosa_ioctl,
#if LIMOSA_HAVE_REGION_INFO_OP
	.get_region_info_caps = limosa_region_info,
#endif
	.mmap = limosa_mmap,
	.request = limosa_request,
	.dma_unmap = limosa_dma_unmap,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};
