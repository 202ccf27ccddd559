// SPDX-License-Identifier: GPL-2.0-only
/*
 * The tester's side of the device: attributes in the folder "limosa" of the
 * mediated device. README.md lists them.
 */
#include <linux/device.h>
#include <linux/kstrtox.h>
#include <linux/log2.h>
#include <linux/sizes.h>
#include <linux/sysfs.h>

#include "limosa.h"

/* "await" gives up after this long, for a removal waits for its readers */
#define LIMOSA_AWAIT_SECONDS	20

static struct limosa_dev *limosa_of(struct device *device)
{
	return dev_get_drvdata(device);
}

/* A number that is only read */
#define LIMOSA_COUNTER(_name, _value)							\
static ssize_t _name##_show(struct device *device, struct device_attribute *attr, char *buf) \
{											\
	struct limosa_dev *dev = limosa_of(device);					\
											\
	guard(mutex)(&dev->lock);							\
	return sysfs_emit(buf, "%llu\n", (u64)(_value));				\
}											\
static DEVICE_ATTR_RO(_name)

/* A number of 32 bits that may be set at any time */
#define LIMOSA_NUMBER(_name)								\
static ssize_t _name##_show(struct device *device, struct device_attribute *attr, char *buf) \
{											\
	struct limosa_dev *dev = limosa_of(device);					\
											\
	guard(mutex)(&dev->lock);							\
	return sysfs_emit(buf, "%u\n", dev->_name);					\
}											\
static ssize_t _name##_store(struct device *device, struct device_attribute *attr,	\
			     const char *buf, size_t count)				\
{											\
	struct limosa_dev *dev = limosa_of(device);					\
	u32 value;									\
	int ret;									\
											\
	ret = kstrtou32(buf, 0, &value);						\
	if (ret)									\
		return ret;								\
	guard(mutex)(&dev->lock);							\
	dev->_name = value;								\
	return count;									\
}											\
static DEVICE_ATTR_RW(_name)

/* A rule, which takes effect on those who are held too */
#define LIMOSA_RULE(_name, _with_error)							\
static ssize_t _name##_show(struct device *device, struct device_attribute *attr, char *buf) \
{											\
	struct limosa_dev *dev = limosa_of(device);					\
											\
	guard(mutex)(&dev->lock);							\
	return limosa_rule_show(&dev->_name, buf, _with_error);				\
}											\
static ssize_t _name##_store(struct device *device, struct device_attribute *attr,	\
			     const char *buf, size_t count)				\
{											\
	struct limosa_dev *dev = limosa_of(device);					\
	int ret;									\
											\
	guard(mutex)(&dev->lock);							\
	ret = limosa_rule_parse(&dev->_name, buf, _with_error);				\
	if (ret)									\
		return ret;								\
	limosa_look_again(dev);								\
	return count;									\
}											\
static DEVICE_ATTR_RW(_name)

LIMOSA_NUMBER(arc_delay_ms);
LIMOSA_NUMBER(dirty_percent);
LIMOSA_NUMBER(read_bytes_max);
LIMOSA_NUMBER(read_delay_ms);
LIMOSA_NUMBER(write_bytes_max);
LIMOSA_NUMBER(log_ranges_max);

LIMOSA_RULE(hold, false);
LIMOSA_RULE(fail, true);
LIMOSA_RULE(error, true);

LIMOSA_COUNTER(check, limosa_content_check(dev, &dev->content));
LIMOSA_COUNTER(dirtied, dev->dirtied);
LIMOSA_COUNTER(ignored, dev->ignored);
LIMOSA_COUNTER(logging, READ_ONCE(dev->logging));
LIMOSA_COUNTER(opened, dev->opened);
LIMOSA_COUNTER(opens, dev->opens);
LIMOSA_COUNTER(pinned, READ_ONCE(dev->pinned));
LIMOSA_COUNTER(resets, dev->resets);
LIMOSA_COUNTER(sessions, dev->sessions);

static ssize_t state_bytes_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return sysfs_emit(buf, "%llu\n", dev->state_bytes);
}

static ssize_t state_bytes_store(struct device *device, struct device_attribute *attr,
				 const char *buf, size_t count)
{
	struct limosa_dev *dev = limosa_of(device);
	u64 bytes;
	int ret;

	ret = kstrtou64(buf, 0, &bytes);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	if (dev->opened)
		return -EBUSY;
	return limosa_content_resize(dev, bytes, dev->block_bytes) ?: count;
}
static DEVICE_ATTR_RW(state_bytes);

static ssize_t block_bytes_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return sysfs_emit(buf, "%u\n", dev->block_bytes);
}

static ssize_t block_bytes_store(struct device *device, struct device_attribute *attr,
				 const char *buf, size_t count)
{
	struct limosa_dev *dev = limosa_of(device);
	u32 bytes;
	int ret;

	ret = kstrtou32(buf, 0, &bytes);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	if (dev->opened)
		return -EBUSY;
	return limosa_content_resize(dev, dev->state_bytes, bytes) ?: count;
}
static DEVICE_ATTR_RW(block_bytes);

static ssize_t log_page_bytes_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->dma_lock);
	return sysfs_emit(buf, "%llu\n", dev->log_page_bytes);
}

static ssize_t log_page_bytes_store(struct device *device, struct device_attribute *attr,
				    const char *buf, size_t count)
{
	struct limosa_dev *dev = limosa_of(device);
	u64 bytes;
	int ret;

	ret = kstrtou64(buf, 0, &bytes);
	if (ret)
		return ret;
	if (bytes && (!is_power_of_2(bytes) || bytes < SZ_4K || bytes > SZ_1G))
		return -EINVAL;
	guard(mutex)(&dev->dma_lock);
	dev->log_page_bytes = bytes;
	return count;
}
static DEVICE_ATTR_RW(log_page_bytes);

static ssize_t seed_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return sysfs_emit(buf, "%llu\n", dev->content.registers.seed);
}

/* What only a device that runs can do, with the number that was written */
static ssize_t limosa_act(struct device *device, const char *buf, size_t count,
			  void (*act)(struct limosa_dev *dev, u64 number))
{
	struct limosa_dev *dev = limosa_of(device);
	u64 number;
	int ret;

	ret = kstrtou64(buf, 0, &number);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	if (!limosa_runs(dev->state))
		return -EBUSY;
	act(dev, number);
	return count;
}

static ssize_t seed_store(struct device *device, struct device_attribute *attr, const char *buf,
			  size_t count)
{
	return limosa_act(device, buf, count, limosa_reseed);
}
static DEVICE_ATTR_RW(seed);

static ssize_t dirty_store(struct device *device, struct device_attribute *attr, const char *buf,
			   size_t count)
{
	return limosa_act(device, buf, count, limosa_dirty);
}
static DEVICE_ATTR_WO(dirty);

static ssize_t reinit_store(struct device *device, struct device_attribute *attr, const char *buf,
			    size_t count)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	if (!dev->session || !limosa_pre_copies(dev->state))
		return -EBUSY;
	limosa_save_reinit(dev->session);
	return count;
}
static DEVICE_ATTR_WO(reinit);

static ssize_t state_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return sysfs_emit(buf, "%s\n", limosa_state_name(dev->state));
}

/* The tester can break the device, and do no more to its state */
static ssize_t state_store(struct device *device, struct device_attribute *attr, const char *buf,
			   size_t count)
{
	struct limosa_dev *dev = limosa_of(device);

	if (!sysfs_streq(buf, limosa_state_name(VFIO_DEVICE_STATE_ERROR)))
		return -EINVAL;
	guard(mutex)(&dev->lock);
	if (!dev->type->migration_flags)
		return -EOPNOTSUPP;
	limosa_break(dev);
	return count;
}
static DEVICE_ATTR_RW(state);

static ssize_t gone_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return sysfs_emit(buf, "%d\n", dev->gone);
}

/* Pulled out without a word: from now on the device answers nobody */
static ssize_t gone_store(struct device *device, struct device_attribute *attr, const char *buf,
			  size_t count)
{
	struct limosa_dev *dev = limosa_of(device);
	bool gone;
	int ret;

	ret = kstrtobool(buf, &gone);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	/* What is plugged in again has just got power */
	if (dev->gone && !gone) {
		limosa_content_clear(dev);
		dev->state = VFIO_DEVICE_STATE_RUNNING;
	}
	if (gone)
		limosa_close_session(dev);
	WRITE_ONCE(dev->gone, gone);
	limosa_look_again(dev);
	return count;
}
static DEVICE_ATTR_RW(gone);

static ssize_t limosa_held_show(struct limosa_dev *dev, char *buf)
{
	ssize_t length;

	lockdep_assert_held(&dev->lock);
	if (dev->held_sequence != dev->sequence)
		return sysfs_emit(buf, "none\n");
	length = limosa_place_show(&dev->held, buf);
	return length + sysfs_emit_at(buf, length, "\n");
}

static ssize_t held_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);

	guard(mutex)(&dev->lock);
	return limosa_held_show(dev, buf);
}
static DEVICE_ATTR_RO(held);

/* As "held", once somebody is */
static ssize_t await_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct limosa_dev *dev = limosa_of(device);
	long ret;

	ret = wait_event_interruptible_timeout(dev->wait,
					       READ_ONCE(dev->held_sequence) ==
					       READ_ONCE(dev->sequence),
					       LIMOSA_AWAIT_SECONDS * HZ);
	if (ret < 0)
		return ret;
	if (!ret)
		return -ETIMEDOUT;
	guard(mutex)(&dev->lock);
	return limosa_held_show(dev, buf);
}
static DEVICE_ATTR_RO(await);

static struct attribute *limosa_attributes[] = {
	&dev_attr_arc_delay_ms.attr,
	&dev_attr_await.attr,
	&dev_attr_block_bytes.attr,
	&dev_attr_check.attr,
	&dev_attr_dirtied.attr,
	&dev_attr_dirty.attr,
	&dev_attr_dirty_percent.attr,
	&dev_attr_error.attr,
	&dev_attr_fail.attr,
	&dev_attr_gone.attr,
	&dev_attr_held.attr,
	&dev_attr_hold.attr,
	&dev_attr_ignored.attr,
	&dev_attr_log_page_bytes.attr,
	&dev_attr_log_ranges_max.attr,
	&dev_attr_logging.attr,
	&dev_attr_opened.attr,
	&dev_attr_opens.attr,
	&dev_attr_pinned.attr,
	&dev_attr_read_bytes_max.attr,
	&dev_attr_read_delay_ms.attr,
	&dev_attr_reinit.attr,
	&dev_attr_resets.attr,
	&dev_attr_seed.attr,
	&dev_attr_sessions.attr,
	&dev_attr_state.attr,
	&dev_attr_state_bytes.attr,
	&dev_attr_write_bytes_max.attr,
	NULL,
};

static const struct attribute_group limosa_attribute_group = {
	.name = "limosa",
	.attrs = limosa_attributes,
};

const struct attribute_group *limosa_attribute_groups[] = {
	&limosa_attribute_group,
	NULL,
};
