// SPDX-License-Identifier: GPL-2.0-only
/*
 * A saving session: the stream that is read in PRE_COPY, PRE_COPY_P2P and
 * STOP_COPY, made record by record as it is read.
 */
#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "limosa.h"

static u64 limosa_record_bytes(struct limosa_dev *dev, u32 block)
{
	return sizeof(struct limosa_record) + limosa_block_length(dev, block);
}

/* All blocks' records; only the last block may be shorter */
static u64 limosa_all_bytes(struct limosa_dev *dev)
{
	return dev->state_bytes + (u64)dev->blocks * sizeof(struct limosa_record);
}

static bool limosa_page_is_zero(struct limosa_dev *dev, u32 page)
{
	return !memchr_inv(dev->content.memory + page * PAGE_SIZE, 0, PAGE_SIZE);
}

/* What comes after the blocks, as far as it is not in the buffer yet */
static u64 limosa_tail_bytes(struct limosa_dev *dev, enum limosa_stage stage, u32 next)
{
	u64 bytes = 0;
	u32 page;

	if (stage <= LIMOSA_STAGE_REGISTERS)
		bytes += sizeof(struct limosa_record) + sizeof(struct limosa_registers);
	if (stage < LIMOSA_STAGE_MEMORY)
		next = 0;
	for (page = next; stage <= LIMOSA_STAGE_MEMORY && page < LIMOSA_MEMORY_PAGES; page++) {
		if (!limosa_page_is_zero(dev, page))
			bytes += sizeof(struct limosa_record) + PAGE_SIZE;
	}
	if (stage <= LIMOSA_STAGE_END)
		bytes += sizeof(struct limosa_record);
	return bytes;
}

/* MIG_DATA_SIZE: what a stop-copy would still read, were the device stopped now */
u64 limosa_save_bytes(struct limosa_dev *dev)
{
	struct limosa_session *session = dev->session;

	lockdep_assert_held(&dev->lock);
	if (!session || !limosa_saves(dev->state))
		return sizeof(struct limosa_header) + limosa_all_bytes(dev) +
		       limosa_tail_bytes(dev, LIMOSA_STAGE_HEADER, 0);
	if (session->stage > LIMOSA_STAGE_BLOCKS)
		return session->filled - session->taken +
		       limosa_tail_bytes(dev, session->stage, session->next);
	return session->initial_bytes + session->dirty_bytes +
	       limosa_tail_bytes(dev, session->stage, 0);
}

/* A block has changed: it is sent again, unless it was not sent yet */
void limosa_save_changed(struct limosa_session *session, u32 block)
{
	struct limosa_dev *dev = session->dev;

	lockdep_assert_held(&dev->lock);
	if (!session->unsent || test_bit(block, session->unsent))
		return;
	if (__test_and_set_bit(block, session->dirty))
		return;
	session->dirty_blocks++;
	session->dirty_bytes += limosa_record_bytes(dev, block);
}

/*
 * The device was configured anew: all of its state is initial data again. A
 * user that has not opted in knows no such thing, and is told of changes.
 */
void limosa_save_reinit(struct limosa_session *session)
{
	struct limosa_dev *dev = session->dev;
	u32 block;

	lockdep_assert_held(&dev->lock);
#ifdef VFIO_PRECOPY_INFO_REINIT
	if (dev->vdev.precopy_info_v2) {
		bitmap_fill(session->unsent, dev->blocks);
		bitmap_zero(session->dirty, dev->blocks);
		session->unsent_blocks = dev->blocks;
		session->dirty_blocks = 0;
		session->dirty_bytes = 0;
		/* What is in the buffer has to be read first, so it counts too */
		session->initial_bytes = limosa_all_bytes(dev) + session->filled - session->taken;
		if (session->stage == LIMOSA_STAGE_HEADER)
			session->initial_bytes += sizeof(struct limosa_header);
		session->in_buffer_initial = true;
		session->reinit = true;
		wake_up_all(&dev->wait);
		return;
	}
#endif
	for (block = 0; block < dev->blocks; block++)
		limosa_save_changed(session, block);
	wake_up_all(&dev->wait);
}

static void limosa_put_record(struct limosa_session *session, u32 kind, u64 index, u64 generation,
			      u32 length)
{
	struct limosa_record *record = (struct limosa_record *)session->buffer;

	record->kind = cpu_to_le32(kind);
	record->length = cpu_to_le32(length);
	record->index = cpu_to_le64(index);
	record->generation = cpu_to_le64(generation);
	record->seed = cpu_to_le64(session->dev->content.registers.seed);
	record->check = cpu_to_le64(limosa_record_check(record, record + 1));
	session->taken = 0;
	session->filled = sizeof(*record) + length;
}

static void limosa_put_header(struct limosa_session *session)
{
	struct limosa_header *header = (struct limosa_header *)session->buffer;
	struct limosa_dev *dev = session->dev;

	memset(header, 0, sizeof(*header));
	header->magic = cpu_to_le64(LIMOSA_MAGIC);
	header->version = cpu_to_le32(LIMOSA_VERSION);
	header->state_bytes = cpu_to_le64(dev->state_bytes);
	header->block_bytes = cpu_to_le32(dev->block_bytes);
	header->memory_bytes = cpu_to_le32(LIMOSA_MEMORY_BYTES);
	header->check = cpu_to_le64(limosa_header_check(header));
	session->taken = 0;
	session->filled = sizeof(*header);
	session->in_buffer_initial = true;
}

static void limosa_put_block(struct limosa_session *session, u32 block)
{
	struct limosa_content *content = &session->dev->content;
	u32 length = limosa_block_length(session->dev, block);
	u32 generation = content->generations[block];

	limosa_block_fill(session->buffer + sizeof(struct limosa_record), length,
			  content->registers.seed, block, generation);
	limosa_put_record(session, LIMOSA_RECORD_BLOCK, block, generation, length);
}

static void limosa_put_registers(struct limosa_session *session)
{
	const u64 *from = (const u64 *)&session->dev->content.registers;
	__le64 *to = (__le64 *)(session->buffer + sizeof(struct limosa_record));
	u32 i;

	for (i = 0; i < LIMOSA_REGISTERS; i++)
		to[i] = cpu_to_le64(from[i]);
	limosa_put_record(session, LIMOSA_RECORD_REGISTERS, 0, 0,
			  sizeof(struct limosa_registers));
}

/* The next block to send: those never sent first. The caller knows there is one. */
static u32 limosa_take_block(struct limosa_session *session)
{
	bool initial = session->unsent_blocks;
	unsigned long *set = initial ? session->unsent : session->dirty;
	u32 block;

	block = find_next_bit(set, session->dev->blocks, session->next);
	if (block >= session->dev->blocks)
		block = find_first_bit(set, session->dev->blocks);
	__clear_bit(block, set);
	if (initial)
		session->unsent_blocks--;
	else
		session->dirty_blocks--;
	session->next = block + 1;
	session->in_buffer_initial = initial;
	return block;
}

/* While it is sent, a running device changes, as much as the tester wants */
static void limosa_change_while_sending(struct limosa_session *session)
{
	struct limosa_dev *dev = session->dev;

	if (!limosa_pre_copies(dev->state))
		return;
	session->percent += dev->dirty_percent;
	limosa_dirty(dev, session->percent / 100);
	session->percent %= 100;
}

/*
 * Makes the next record, if the buffer is empty. Returns the bytes that are
 * there to be read, 0 at the end of the stream, or -ENOMSG if for now there is
 * nothing.
 */
static ssize_t limosa_save_next(struct limosa_session *session)
{
	struct limosa_dev *dev = session->dev;
	u32 block;

	while (session->taken == session->filled) {
		switch (session->stage) {
		case LIMOSA_STAGE_HEADER:
			limosa_put_header(session);
			session->stage = LIMOSA_STAGE_BLOCKS;
			break;
		case LIMOSA_STAGE_BLOCKS:
			if (session->unsent_blocks || session->dirty_blocks) {
				block = limosa_take_block(session);
				limosa_put_block(session, block);
				limosa_change_while_sending(session);
				break;
			}
			if (limosa_pre_copies(dev->state))
				return -ENOMSG;
			session->stage = LIMOSA_STAGE_REGISTERS;
			break;
		case LIMOSA_STAGE_REGISTERS:
			limosa_put_registers(session);
			session->stage = LIMOSA_STAGE_MEMORY;
			session->next = 0;
			break;
		case LIMOSA_STAGE_MEMORY:
			while (session->next < LIMOSA_MEMORY_PAGES &&
			       limosa_page_is_zero(dev, session->next))
				session->next++;
			if (session->next == LIMOSA_MEMORY_PAGES) {
				session->stage = LIMOSA_STAGE_END;
				break;
			}
			memcpy(session->buffer + sizeof(struct limosa_record),
			       dev->content.memory + session->next * PAGE_SIZE, PAGE_SIZE);
			limosa_put_record(session, LIMOSA_RECORD_MEMORY, session->next, 0,
					  PAGE_SIZE);
			session->next++;
			break;
		case LIMOSA_STAGE_END:
			limosa_put_record(session, LIMOSA_RECORD_END, dev->blocks,
					  limosa_content_check(dev, &dev->content), 0);
			session->stage = LIMOSA_STAGE_DONE;
			break;
		case LIMOSA_STAGE_DONE:
			return 0;
		}
	}
	return session->filled - session->taken;
}

static void limosa_save_took(struct limosa_session *session, size_t bytes)
{
	session->taken += bytes;
	session->position += bytes;
	/* What comes after the blocks was never counted */
	if (session->stage > LIMOSA_STAGE_BLOCKS)
		return;
	if (session->in_buffer_initial)
		session->initial_bytes -= bytes;
	else
		session->dirty_bytes -= bytes;
}

static ssize_t limosa_save_read(struct file *filp, char __user *to, size_t length, loff_t *pos)
{
	struct limosa_place here = { .point = LIMOSA_AT_READ };
	struct limosa_session *session = filp->private_data;
	bool wait = !(filp->f_flags & O_NONBLOCK);
	struct limosa_dev *dev = session->dev;
	size_t done = 0;
	ssize_t ret;
	size_t chunk;

	if (pos)
		return -ESPIPE;
	ret = mutex_lock_interruptible(&session->io);
	if (ret)
		return ret;

	while (done < length && !(done && fatal_signal_pending(current))) {
		if (!done) {
			here.at = session->position;
			ret = limosa_pass(dev, &here, session, wait);
			if (!ret && wait)
				ret = limosa_linger(READ_ONCE(dev->read_delay_ms));
			if (ret)
				break;
		}

		mutex_lock(&dev->lock);
		if (session->dead) {
			mutex_unlock(&dev->lock);
			ret = -ENODEV;
			break;
		}
		if (done && dev->read_bytes_max && done >= dev->read_bytes_max) {
			mutex_unlock(&dev->lock);
			break;
		}
		chunk = min_t(u64, length - done,
			      limosa_room(dev, LIMOSA_AT_READ, session->position));
		if (!chunk) {
			/* A rule is due: now for this read, or for the next one */
			mutex_unlock(&dev->lock);
			if (done)
				break;
			continue;
		}
		if (dev->read_bytes_max)
			chunk = min_t(size_t, chunk, dev->read_bytes_max - done);
		ret = limosa_save_next(session);
		if (ret > 0)
			chunk = min_t(size_t, chunk, ret);
		mutex_unlock(&dev->lock);
		if (ret <= 0)
			break;

		if (copy_to_user(to + done, session->buffer + session->taken, chunk)) {
			ret = -EFAULT;
			break;
		}
		mutex_lock(&dev->lock);
		limosa_save_took(session, chunk);
		mutex_unlock(&dev->lock);
		done += chunk;
		cond_resched();
	}
	mutex_unlock(&session->io);
	return done ?: ret;
}

static __poll_t limosa_save_poll(struct file *filp, struct poll_table_struct *table)
{
	struct limosa_session *session = filp->private_data;
	struct limosa_dev *dev = session->dev;

	poll_wait(filp, &dev->wait, table);
	guard(mutex)(&dev->lock);
	if (session->dead)
		return EPOLLIN | EPOLLRDNORM | EPOLLERR;
	if (session->taken < session->filled || session->stage != LIMOSA_STAGE_BLOCKS ||
	    session->unsent_blocks || session->dirty_blocks || !limosa_pre_copies(dev->state))
		return EPOLLIN | EPOLLRDNORM;
	return 0;
}

static int limosa_precopy_get(struct limosa_dev *dev, unsigned int cmd, unsigned long arg,
			      struct vfio_precopy_info *info)
{
#if LIMOSA_HAVE_PRECOPY_CHECK
	return vfio_check_precopy_ioctl(&dev->vdev, cmd, arg, info);
#else
	size_t size = offsetofend(struct vfio_precopy_info, dirty_bytes);

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(info, (void __user *)arg, size))
		return -EFAULT;
	return info->argsz < size ? -EINVAL : 0;
#endif
}

static long limosa_save_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	static const struct limosa_place here = { .point = LIMOSA_AT_INFO };
	struct limosa_session *session = filp->private_data;
	struct limosa_dev *dev = session->dev;
	struct vfio_precopy_info info = {};
	int ret;

	ret = limosa_precopy_get(dev, cmd, arg, &info);
	if (ret)
		return ret;
	ret = limosa_pass(dev, &here, session, true);
	if (ret)
		return ret;

	mutex_lock(&dev->lock);
	if (session->dead) {
		ret = -ENODEV;
	} else if (!limosa_pre_copies(dev->state)) {
		ret = -EINVAL;
	} else {
		info.initial_bytes = session->initial_bytes;
		info.dirty_bytes = session->dirty_bytes;
#ifdef VFIO_PRECOPY_INFO_REINIT
		/* Said once; an error in the copy below says it in vain */
		if (session->reinit)
			info.flags |= VFIO_PRECOPY_INFO_REINIT;
		session->reinit = false;
#endif
	}
	mutex_unlock(&dev->lock);
	if (ret)
		return ret;

	if (copy_to_user((void __user *)arg, &info,
			 offsetofend(struct vfio_precopy_info, dirty_bytes)))
		return -EFAULT;
	return 0;
}

static const struct file_operations limosa_save_fops = {
	.owner = THIS_MODULE,
	.read = limosa_save_read,
	.poll = limosa_save_poll,
	.unlocked_ioctl = limosa_save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = limosa_session_release,
};

struct limosa_session *limosa_save_begin(struct limosa_dev *dev)
{
	struct limosa_session *session;

	session = limosa_session_new(dev, "[limosa-save]", &limosa_save_fops, O_RDONLY);
	if (IS_ERR(session))
		return session;

	session->unsent = kvcalloc(BITS_TO_LONGS(dev->blocks), sizeof(long), GFP_KERNEL_ACCOUNT);
	session->dirty = kvcalloc(BITS_TO_LONGS(dev->blocks), sizeof(long), GFP_KERNEL_ACCOUNT);
	if (!session->unsent || !session->dirty) {
		fput(session->filp);
		return ERR_PTR(-ENOMEM);
	}
	bitmap_fill(session->unsent, dev->blocks);
	session->unsent_blocks = dev->blocks;
	session->initial_bytes = sizeof(struct limosa_header) + limosa_all_bytes(dev);
	return session;
}
