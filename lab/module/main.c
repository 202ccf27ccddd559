// SPDX-License-Identifier: GPL-2.0-only
/*
 * The parent device "limosa", its types, and the life of one mediated device.
 */
#include <linux/device.h>
#include <linux/module.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "limosa.h"

#define LIMOSA_INSTANCES_MAX	64
#define LIMOSA_STATE_BYTES	(256 * 1024)
#define LIMOSA_BLOCK_BYTES	4096

static struct limosa_type limosa_types[] = {
	{
		.number = 1,
		.type.sysfs_name = "full",
		.type.pretty_name = "Pre-copy, peer-to-peer and DMA logging",
		.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
				   VFIO_MIGRATION_PRE_COPY,
		.logs = true,
	},
	{
		.number = 2,
		.type.sysfs_name = "precopy",
		.type.pretty_name = "Pre-copy without peer-to-peer or DMA logging",
		.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY,
	},
	{
		.number = 3,
		.type.sysfs_name = "p2p",
		.type.pretty_name = "Peer-to-peer and DMA logging without pre-copy",
		.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P,
		.logs = true,
	},
	{
		.number = 4,
		.type.sysfs_name = "plain",
		.type.pretty_name = "Stop-copy and nothing else",
		.migration_flags = VFIO_MIGRATION_STOP_COPY,
	},
	{
		.number = 5,
		.type.sysfs_name = "none",
		.type.pretty_name = "No migration",
	},
};

static struct mdev_type *limosa_mdev_types[ARRAY_SIZE(limosa_types)];
static struct mdev_parent limosa_parent;
static struct device *limosa_device;

/* A type is named after its parent's class: "limosa-full" */
static const struct class limosa_class = {
	.name = "limosa",
};

static int limosa_probe(struct mdev_device *mdev)
{
	struct limosa_dev *dev;
	int ret;

	dev = vfio_alloc_device(limosa_dev, vdev, &mdev->dev, &limosa_device_ops);
	if (IS_ERR(dev))
		return PTR_ERR(dev);

	dev_set_drvdata(&mdev->dev, dev);
	ret = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (ret)
		vfio_put_device(&dev->vdev);
	return ret;
}

static void limosa_remove(struct mdev_device *mdev)
{
	struct limosa_dev *dev = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&dev->vdev);
	vfio_put_device(&dev->vdev);
}

int limosa_init_dev(struct vfio_device *vdev)
{
	struct mdev_device *mdev = to_mdev_device(vdev->dev);
	struct limosa_dev *dev = to_limosa(vdev);
	int ret;

	dev->type = container_of(mdev->type, struct limosa_type, type);
	dev->state = VFIO_DEVICE_STATE_RUNNING;
	dev->sequence = 1;
	mutex_init(&dev->arc_lock);
	mutex_init(&dev->dma_lock);
	mutex_init(&dev->lock);
	init_waitqueue_head(&dev->wait);
	xa_init(&dev->pins);
	xa_init(&dev->log);

	dev->content.memory = vmalloc_user(LIMOSA_MEMORY_BYTES);
	if (!dev->content.memory)
		return -ENOMEM;
	ret = limosa_content_resize(dev, LIMOSA_STATE_BYTES, LIMOSA_BLOCK_BYTES);
	if (ret) {
		vfree(dev->content.memory);
		return ret;
	}

	if (dev->type->migration_flags) {
		vdev->migration_flags = dev->type->migration_flags;
		vdev->mig_ops = &limosa_migration_ops;
	}
	if (dev->type->logs)
		vdev->log_ops = &limosa_log_ops;
	return 0;
}

void limosa_release_dev(struct vfio_device *vdev)
{
	struct limosa_dev *dev = to_limosa(vdev);

	vfree(dev->content.memory);
	kvfree(dev->content.generations);
	xa_destroy(&dev->log);
	xa_destroy(&dev->pins);
	mutex_destroy(&dev->lock);
	mutex_destroy(&dev->dma_lock);
	mutex_destroy(&dev->arc_lock);
}

int limosa_open_device(struct vfio_device *vdev)
{
	struct limosa_dev *dev = to_limosa(vdev);

	guard(mutex)(&dev->lock);
	if (dev->gone)
		return -ENODEV;
	dev->opened = true;
	dev->opens++;
	return 0;
}

/*
 * The last user is gone, perhaps killed at the worst of moments. All that it
 * had is taken back; the content stays, as on a device with memory of its own.
 */
void limosa_close_device(struct vfio_device *vdev)
{
	struct limosa_dev *dev = to_limosa(vdev);

	mutex_lock(&dev->dma_lock);
	limosa_log_end(dev);
	limosa_dma_unpin_all(dev);
	mutex_lock(&dev->lock);
	limosa_close_session(dev);
	limosa_irqs_release(dev);
	dev->content.registers.dma_command = 0;
	dev->state = VFIO_DEVICE_STATE_RUNNING;
	dev->opened = false;
	limosa_look_again(dev);
	mutex_unlock(&dev->lock);
	mutex_unlock(&dev->dma_lock);
}

static struct mdev_driver limosa_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = LIMOSA_INSTANCES_MAX,
	.driver = {
		.name = "limosa",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = limosa_attribute_groups,
	},
	.probe = limosa_probe,
	.remove = limosa_remove,
};

static int __init limosa_init(void)
{
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(limosa_types); i++)
		limosa_mdev_types[i] = &limosa_types[i].type;

	ret = class_register(&limosa_class);
	if (ret)
		return ret;

	ret = mdev_register_driver(&limosa_driver);
	if (ret)
		goto err_class;

	limosa_device = device_create(&limosa_class, NULL, 0, NULL, "limosa");
	if (IS_ERR(limosa_device)) {
		ret = PTR_ERR(limosa_device);
		goto err_driver;
	}

	ret = mdev_register_parent(&limosa_parent, limosa_device, &limosa_driver,
				   limosa_mdev_types, ARRAY_SIZE(limosa_mdev_types));
	if (ret)
		goto err_device;
	return 0;

err_device:
	device_unregister(limosa_device);
err_driver:
	mdev_unregister_driver(&limosa_driver);
err_class:
	class_unregister(&limosa_class);
	return ret;
}

static void __exit limosa_exit(void)
{
	mdev_unregister_parent(&limosa_parent);
	device_unregister(limosa_device);
	mdev_unregister_driver(&limosa_driver);
	class_unregister(&limosa_class);
}

module_init(limosa_init)
module_exit(limosa_exit)

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("IOMMUFD");
#else
MODULE_IMPORT_NS(IOMMUFD);
#endif
MODULE_DESCRIPTION("Synthetic mediated device for proving migration software");
MODULE_AUTHOR("The Limosa project");
MODULE_LICENSE("GPL");
