// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device as its user's ioctls and accesses see it: its regions, of which
 * BAR2 is memory that can in part be mapped, and PCI configuration space.
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
