// SPDX-License-Identifier: GPL-2.0-only
/*
 * The migration state machine: arcs, sessions, reset and ERROR.
 * include/uapi/linux/vfio.h, enum vfio_device_mig_state.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/slab.h>

#include "limosa.h"

/*
 * A new session, referred to by the device and by the file that the caller
 * hands out. Its buffer holds the largest record.
 */
struct limosa_session *limosa_session_new(struct limosa_dev *dev, const char *name,
					  const struct file_operations *fops, int flags)
{
	size_t largest = max_t(size_t, dev->block_bytes, PAGE_SIZE);
	struct limosa_session *session;
	int ret = -ENOMEM;

	lockdep_assert_held(&dev->lock);
	session = kzalloc_obj(*session, GFP_KERNEL_ACCOUNT);
	if (!session)
		return ERR_PTR(-ENOMEM);
	BUILD_BUG_ON(sizeof(struct limosa_registers) > PAGE_SIZE);
	session->buffer = kvmalloc(largest + sizeof(struct limosa_record), GFP_KERNEL_ACCOUNT);
	if (!session->buffer)
		goto err_session;

	session->filp = anon_inode_getfile(name, fops, session, flags);
	if (IS_ERR(session->filp)) {
		ret = PTR_ERR(session->filp);
		goto err_buffer;
	}
	stream_open(session->filp->f_inode, session->filp);

	mutex_init(&session->io);
	session->dev = dev;
	/* The file may outlive the device, and its reader wants the lock */
	get_device(&dev->vdev.device);
	dev->sessions++;
	return session;

err_buffer:
	kvfree(session->buffer);
err_session:
	kfree(session);
	return ERR_PTR(ret);
}

int limosa_session_release(struct inode *inode, struct file *filp)
{
	struct limosa_session *session = filp->private_data;

	kvfree(session->unsent);
	kvfree(session->dirty);
	kvfree(session->loaded);
	kvfree(session->staged.generations);
	kvfree(session->staged.memory);
	kvfree(session->buffer);
	mutex_destroy(&session->io);
	vfio_put_device(&session->dev->vdev);
	kfree(session);
	return 0;
}

/* Ends the session, if there is one: from here on its file says ENODEV */
void limosa_close_session(struct limosa_dev *dev)
{
	struct limosa_session *session = dev->session;

	lockdep_assert_held(&dev->lock);
	if (!session)
		return;
	dev->session = NULL;
	session->dead = true;
	limosa_look_again(dev);
	fput(session->filp);
}

/* The device breaks: ERROR, out of which only a reset leads */
void limosa_break(struct limosa_dev *dev)
{
	lockdep_assert_held(&dev->lock);
	limosa_close_session(dev);
	dev->state = VFIO_DEVICE_STATE_ERROR;
	limosa_raise(dev, VFIO_PCI_ERR_IRQ_INDEX, 0);
	limosa_look_again(dev);
}

int limosa_reset(struct limosa_dev *dev)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_RESET };
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;

	mutex_lock(&dev->dma_lock);
	limosa_log_end(dev);
	limosa_dma_unpin_all(dev);
	mutex_lock(&dev->lock);
	limosa_close_session(dev);
	limosa_content_clear(dev);
	dev->state = VFIO_DEVICE_STATE_RUNNING;
	dev->intx_masked = false;
	dev->intx_pending = false;
	dev->resets++;
	limosa_look_again(dev);
	mutex_unlock(&dev->lock);
	mutex_unlock(&dev->dma_lock);
	return 0;
}

/* What the arc does, both locks held. A session that it opens comes back. */
static struct limosa_session *limosa_arc(struct limosa_dev *dev, enum vfio_device_mig_state next)
{
	enum vfio_device_mig_state from = dev->state;
	struct limosa_session *opened = NULL;
	int ret;

	if (from == VFIO_DEVICE_STATE_RESUMING) {
		ret = limosa_load_finish(dev);
		if (ret)
			return ERR_PTR(ret);
	}

	if (!limosa_saves(from) && limosa_saves(next))
		opened = limosa_save_begin(dev);
	else if (next == VFIO_DEVICE_STATE_RESUMING)
		opened = limosa_load_begin(dev);
	if (IS_ERR(opened))
		return opened;

	/* Only states of the saving group share a session */
	if (!limosa_saves(from) || !limosa_saves(next))
		limosa_close_session(dev);
	if (opened)
		dev->session = opened;
	dev->state = next;
	/* In STOP_COPY the stream that had nothing has its end to give */
	wake_up_all(&dev->wait);
	return opened;
}

static struct file *limosa_step(struct limosa_dev *dev, enum vfio_device_mig_state next)
{
	struct limosa_place here = { .point = LIMOSA_AT_ARC, .to = next };
	struct limosa_session *session;
	struct file *filp = NULL;
	u64 resets;
	int ret;

	mutex_lock(&dev->lock);
	here.from = dev->state;
	resets = dev->resets;
	mutex_unlock(&dev->lock);

	ret = limosa_pass(dev, &here, NULL, true);
	if (!ret)
		ret = limosa_linger(READ_ONCE(dev->arc_delay_ms));
	if (ret)
		return ERR_PTR(ret);

	mutex_lock(&dev->dma_lock);
	mutex_lock(&dev->lock);
	if (dev->gone)
		session = ERR_PTR(-ENODEV);
	else if (dev->resets != resets || dev->state != here.from)
		session = ERR_PTR(-ECANCELED);
	else
		session = limosa_arc(dev, next);
	if (IS_ERR(session))
		filp = ERR_CAST(session);
	else if (session)
		filp = get_file(session->filp);
	mutex_unlock(&dev->lock);

	/* What was asked for while the device stood still happens now */
	if (!IS_ERR(filp) && limosa_may_dma(next))
		limosa_dma_run(dev);
	mutex_unlock(&dev->dma_lock);
	return filp;
}

static struct file *limosa_set_state(struct vfio_device *vdev, enum vfio_device_mig_state state)
{
	struct limosa_dev *dev = to_limosa(vdev);
	enum vfio_device_mig_state current_state, next;
	struct file *filp = NULL;
	int ret;

	ret = mutex_lock_interruptible(&dev->arc_lock);
	if (ret)
		return ERR_PTR(ret);

	for (;;) {
		mutex_lock(&dev->lock);
		current_state = dev->state;
		ret = dev->gone ? -ENODEV : 0;
		mutex_unlock(&dev->lock);
		/* A file comes with the last arc of a path, if at all */
		if (ret || filp || current_state == state)
			break;
		/* Of ERROR the core must not be asked the way */
		if (current_state == VFIO_DEVICE_STATE_ERROR) {
			ret = -EINVAL;
			break;
		}
		ret = vfio_mig_get_next_state(vdev, current_state, state, &next);
		if (ret)
			break;
		filp = limosa_step(dev, next);
		if (IS_ERR(filp))
			break;
	}
	mutex_unlock(&dev->arc_lock);

	if (ret && !IS_ERR_OR_NULL(filp))
		fput(filp);
	return ret ? ERR_PTR(ret) : filp;
}

static int limosa_get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_GET };
	struct limosa_dev *dev = to_limosa(vdev);
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	*state = dev->state;
	return 0;
}

static int limosa_get_data_size(struct vfio_device *vdev, unsigned long *bytes)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_SIZE };
	struct limosa_dev *dev = to_limosa(vdev);
	int ret;

	ret = limosa_pass(dev, &here, NULL, true);
	if (ret)
		return ret;
	guard(mutex)(&dev->lock);
	*bytes = limosa_save_bytes(dev);
	return 0;
}

const struct vfio_migration_ops limosa_migration_ops = {
	.migration_set_state = limosa_set_state,
	.migration_get_state = limosa_get_state,
	.migration_get_data_size = limosa_get_data_size,
};
