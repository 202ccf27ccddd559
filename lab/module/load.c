// SPDX-License-Identifier: GPL-2.0-only
/*
 * A resuming session: the stream is written, each record is judged as soon as
 * it is whole, and nothing takes effect before RESUMING is left with all of it.
 */
#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "limosa.h"

static int limosa_load_header(struct limosa_session *session)
{
	const struct limosa_header *header = (const struct limosa_header *)session->buffer;
	struct limosa_dev *dev = session->dev;

	/* Not ours, or newer than we are, is said before damage is */
	if (le64_to_cpu(header->magic) != LIMOSA_MAGIC)
		return -EINVAL;
	if (le32_to_cpu(header->version) != LIMOSA_VERSION)
		return -EINVAL;
	if (le64_to_cpu(header->check) != limosa_header_check(header))
		return -EBADMSG;
	if (header->flags || memchr_inv(header->reserved, 0, sizeof(header->reserved)))
		return -EINVAL;
	if (le64_to_cpu(header->state_bytes) != dev->state_bytes ||
	    le32_to_cpu(header->block_bytes) != dev->block_bytes ||
	    le32_to_cpu(header->memory_bytes) != LIMOSA_MEMORY_BYTES)
		return -EINVAL;
	session->header_came = true;
	return 0;
}

/* How long a record of this kind has to be; U32_MAX, which none is, if it cannot be */
static u32 limosa_load_length(struct limosa_session *session, const struct limosa_record *record)
{
	struct limosa_dev *dev = session->dev;
	u64 index = le64_to_cpu(record->index);

	switch (le32_to_cpu(record->kind)) {
	case LIMOSA_RECORD_BLOCK:
		return index < dev->blocks ? limosa_block_length(dev, index) : U32_MAX;
	case LIMOSA_RECORD_REGISTERS:
		return index ? U32_MAX : sizeof(struct limosa_registers);
	case LIMOSA_RECORD_MEMORY:
		return index < LIMOSA_MEMORY_PAGES ? PAGE_SIZE : U32_MAX;
	case LIMOSA_RECORD_END:
		return index == dev->blocks ? 0 : U32_MAX;
	default:
		return U32_MAX;
	}
}

static int limosa_load_block(struct limosa_session *session, const struct limosa_record *record)
{
	struct limosa_dev *dev = session->dev;
	u64 generation = le64_to_cpu(record->generation);
	u64 seed = le64_to_cpu(record->seed);
	u32 block = le64_to_cpu(record->index);

	/* Blocks come before all else */
	if (generation > U32_MAX || session->registers_came)
		return -EBADMSG;
	if (!limosa_block_equals(record + 1, limosa_block_length(dev, block), seed, block,
				 generation))
		return -EBADMSG;

	/* With another seed all blocks are others: those that came are out of date */
	if (seed != session->staged.registers.seed) {
		bitmap_zero(session->loaded, dev->blocks);
		session->loaded_blocks = 0;
		session->staged.registers.seed = seed;
	}
	if (!__test_and_set_bit(block, session->loaded))
		session->loaded_blocks++;
	session->staged.generations[block] = generation;
	return 0;
}

static int limosa_load_registers(struct limosa_session *session, const struct limosa_record *record)
{
	u64 *to = (u64 *)&session->staged.registers;
	const __le64 *from = (const __le64 *)(record + 1);
	u64 seed = session->staged.registers.seed;
	u32 i;

	if (session->registers_came || session->loaded_blocks != session->dev->blocks)
		return -EBADMSG;
	for (i = 0; i < LIMOSA_REGISTERS; i++)
		to[i] = le64_to_cpu(from[i]);
	if (session->staged.registers.seed != seed)
		return -EBADMSG;
	session->registers_came = true;
	return 0;
}

static int limosa_load_memory(struct limosa_session *session, const struct limosa_record *record)
{
	if (!session->registers_came)
		return -EBADMSG;
	memcpy(session->staged.memory + le64_to_cpu(record->index) * PAGE_SIZE, record + 1,
	       PAGE_SIZE);
	return 0;
}

static int limosa_load_end(struct limosa_session *session, const struct limosa_record *record)
{
	if (!session->registers_came ||
	    le64_to_cpu(record->generation) != limosa_content_check(session->dev, &session->staged))
		return -EBADMSG;
	session->ended = true;
	return 0;
}

/*
 * The buffer holds as much as was wanted: the header, or a record's head, or a
 * whole record. Judges it and says what is wanted next.
 */
static int limosa_load_look(struct limosa_session *session)
{
	const struct limosa_record *record = (const struct limosa_record *)session->buffer;
	int ret;

	if (!session->header_came) {
		session->filled = 0;
		session->wanted = sizeof(*record);
		return limosa_load_header(session);
	}
	if (session->filled == sizeof(*record)) {
		/* Before it is believed and filled in */
		if (le32_to_cpu(record->length) != limosa_load_length(session, record))
			return -EBADMSG;
		session->wanted = sizeof(*record) + le32_to_cpu(record->length);
		if (session->filled < session->wanted)
			return 0;
	}

	session->filled = 0;
	session->wanted = sizeof(*record);
	if (le64_to_cpu(record->check) != limosa_record_check(record, record + 1))
		return -EBADMSG;
	switch (le32_to_cpu(record->kind)) {
	case LIMOSA_RECORD_BLOCK:
		ret = limosa_load_block(session, record);
		break;
	case LIMOSA_RECORD_REGISTERS:
		ret = limosa_load_registers(session, record);
		break;
	case LIMOSA_RECORD_MEMORY:
		ret = limosa_load_memory(session, record);
		break;
	default:
		ret = limosa_load_end(session, record);
		break;
	}
	return ret;
}

static ssize_t limosa_load_write(struct file *filp, const char __user *from, size_t length,
				 loff_t *pos)
{
	struct limosa_place here = { .point = LIMOSA_AT_WRITE };
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
			if (ret)
				break;
		}

		mutex_lock(&dev->lock);
		if (session->dead)
			ret = -ENODEV;
		else if (session->broken)
			ret = -session->broken;
		else if (session->ended)
			ret = -EBADMSG;
		if (ret) {
			/* A refused stream stays refused, whatever else comes */
			if (!session->dead && !session->broken)
				session->broken = -ret;
			mutex_unlock(&dev->lock);
			done = 0;
			break;
		}
		if (done && dev->write_bytes_max && done >= dev->write_bytes_max) {
			mutex_unlock(&dev->lock);
			break;
		}
		chunk = min_t(u64, length - done,
			      limosa_room(dev, LIMOSA_AT_WRITE, session->position));
		if (!chunk) {
			mutex_unlock(&dev->lock);
			if (done)
				break;
			continue;
		}
		if (dev->write_bytes_max)
			chunk = min_t(size_t, chunk, dev->write_bytes_max - done);
		mutex_unlock(&dev->lock);

		chunk = min(chunk, session->wanted - session->filled);
		if (copy_from_user(session->buffer + session->filled, from + done, chunk)) {
			ret = -EFAULT;
			break;
		}
		session->filled += chunk;
		session->position += chunk;
		done += chunk;
		if (session->filled == session->wanted) {
			mutex_lock(&dev->lock);
			ret = session->dead ? -ENODEV : limosa_load_look(session);
			if (ret)
				session->broken = -ret;
			mutex_unlock(&dev->lock);
			if (ret) {
				done = 0;
				break;
			}
		}
		cond_resched();
	}
	mutex_unlock(&session->io);
	return done ?: ret;
}

static __poll_t limosa_load_poll(struct file *filp, struct poll_table_struct *table)
{
	struct limosa_session *session = filp->private_data;
	struct limosa_dev *dev = session->dev;

	poll_wait(filp, &dev->wait, table);
	guard(mutex)(&dev->lock);
	return EPOLLOUT | EPOLLWRNORM | (session->dead ? EPOLLERR : 0);
}

static const struct file_operations limosa_load_fops = {
	.owner = THIS_MODULE,
	.write = limosa_load_write,
	.poll = limosa_load_poll,
	.release = limosa_session_release,
};

struct limosa_session *limosa_load_begin(struct limosa_dev *dev)
{
	struct limosa_session *session;

	session = limosa_session_new(dev, "[limosa-load]", &limosa_load_fops, O_WRONLY);
	if (IS_ERR(session))
		return session;

	session->loaded = kvcalloc(BITS_TO_LONGS(dev->blocks), sizeof(long), GFP_KERNEL_ACCOUNT);
	session->staged.generations = kvcalloc(dev->blocks, sizeof(u32), GFP_KERNEL_ACCOUNT);
	session->staged.memory = kvzalloc(LIMOSA_MEMORY_BYTES, GFP_KERNEL_ACCOUNT);
	if (!session->loaded || !session->staged.generations || !session->staged.memory) {
		fput(session->filp);
		return ERR_PTR(-ENOMEM);
	}
	session->wanted = sizeof(struct limosa_header);
	return session;
}

/* RESUMING is being left: what came takes effect as a whole, or the arc fails */
int limosa_load_finish(struct limosa_dev *dev)
{
	struct limosa_session *session = dev->session;

	lockdep_assert_held(&dev->lock);
	/* A device that was gone in the middle has lost its session */
	if (!session)
		return -EINVAL;
	if (session->broken)
		return -session->broken;
	if (!session->ended)
		return -EINVAL;
	memcpy(dev->content.generations, session->staged.generations,
	       dev->blocks * sizeof(*dev->content.generations));
	dev->content.registers = session->staged.registers;
	memcpy(dev->content.memory, session->staged.memory, LIMOSA_MEMORY_BYTES);
	return 0;
}
