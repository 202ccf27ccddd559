/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * limosa: a synthetic mediated device that keeps the VFIO migration protocol.
 *
 * The device's state is a number of blocks whose bytes are generated: what a
 * block holds follows from the device's seed, the block's number and its
 * generation. Only generations are kept, so a gigabyte of state costs a
 * megabyte of memory. README.md describes what users see.
 */
#ifndef LIMOSA_H
#define LIMOSA_H

#include <linux/eventfd.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/xarray.h>

#ifndef kzalloc_obj	/* before Linux 7.0 */
#define kzalloc_obj(object, flags) kzalloc(sizeof(object), flags)
#endif

#define LIMOSA_BLOCKS_MAX	(1U << 22)
#define LIMOSA_BLOCK_BYTES_MIN	64U
#define LIMOSA_BLOCK_BYTES_MAX	(1U << 20)
#define LIMOSA_DMA_BYTES_MAX	(1ULL << 30)
#define LIMOSA_SCRATCHES	8

/* BAR2: pages 1 and 3 may be mapped, 0 and 2 are for pread and pwrite only */
#define LIMOSA_MEMORY_PAGES	4
#define LIMOSA_MEMORY_BYTES	(LIMOSA_MEMORY_PAGES * PAGE_SIZE)

/*
 * The data stream: one struct limosa_header, then records, each a struct
 * limosa_record and @length bytes. All numbers are little-endian.
 */
#define LIMOSA_MAGIC	0x0a0d61736f6d696cULL	/* "limosa\r\n" */
#define LIMOSA_VERSION	1

struct limosa_header {
	__le64 magic;
	__le32 version;
	__le32 flags;
	__le64 state_bytes;
	__le32 block_bytes;
	__le32 memory_bytes;
	__le64 reserved[3];
	__le64 check;
};

enum limosa_record_kind {
	LIMOSA_RECORD_BLOCK = 1,	/* index: block's number */
	LIMOSA_RECORD_REGISTERS = 2,
	LIMOSA_RECORD_MEMORY = 3,	/* index: page of BAR2; absent pages are zero */
	LIMOSA_RECORD_END = 4,		/* index: blocks; generation: limosa_content_check() */
};

struct limosa_record {
	__le32 kind;
	__le32 length;
	__le64 index;
	__le64 generation;
	__le64 seed;
	__le64 check;
};

/* What of the registers is state and goes over the stream, in this order */
struct limosa_registers {
	u64 seed;
	u64 cursor;			/* the block that is dirtied next */
	u64 scratch[LIMOSA_SCRATCHES];
	u64 dma_iova;
	u64 dma_bytes;
	u64 dma_seed;
	u64 dma_command;		/* waits for the device to run, or 0 */
	u64 dma_status;
	u64 dma_check;
	u64 dma_pages;
	u64 pci_command;
	u64 pci_line;
	u64 pci_bar0;
	u64 pci_bar2;
};

#define LIMOSA_REGISTERS (sizeof(struct limosa_registers) / sizeof(u64))

struct limosa_content {
	u32 *generations;
	struct limosa_registers registers;
	u8 *memory;			/* what is behind BAR2 */
};

/* Where the tester can stop the device, or make it fail */
enum limosa_point {
	LIMOSA_AT_ARC,
	LIMOSA_AT_READ,
	LIMOSA_AT_WRITE,
	LIMOSA_AT_INFO,
	LIMOSA_AT_GET,
	LIMOSA_AT_SIZE,
	LIMOSA_AT_START,
	LIMOSA_AT_STOP,
	LIMOSA_AT_REPORT,
	LIMOSA_AT_RESET,
};

struct limosa_place {
	enum limosa_point point;
	int from;			/* LIMOSA_AT_ARC; -1 in a rule: any */
	int to;
	u64 at;				/* LIMOSA_AT_READ, _WRITE: bytes of the session */
};

struct limosa_rule {
	bool armed;
	struct limosa_place place;
	int error;			/* positive errno */
	u32 times;			/* left; 0: for ever */
};

enum limosa_stage {
	LIMOSA_STAGE_HEADER,
	LIMOSA_STAGE_BLOCKS,
	LIMOSA_STAGE_REGISTERS,
	LIMOSA_STAGE_MEMORY,
	LIMOSA_STAGE_END,
	LIMOSA_STAGE_DONE,
};

/* A data transfer session: one open file, which may outlive the device */
struct limosa_session {
	struct limosa_dev *dev;
	struct file *filp;
	struct mutex io;		/* one read or write at a time */
	u8 *buffer;			/* one record at a time; under @io */
	size_t filled;
	size_t wanted;			/* when loading: look at @buffer again then */
	u64 position;			/* bytes gone through; under @io */

	/* All below: under the device's lock */
	bool dead;

	/* Saving */
	enum limosa_stage stage;
	size_t taken;			/* of @buffer, by the reader */
	unsigned long *unsent;		/* blocks not yet sent for the first time */
	unsigned long *dirty;		/* blocks changed since they were sent */
	u32 unsent_blocks;
	u32 dirty_blocks;
	u32 next;			/* block or page to look at next */
	u64 initial_bytes;
	u64 dirty_bytes;
	bool in_buffer_initial;		/* how the rest of @buffer is counted */
	bool reinit;			/* to be reported */
	u32 percent;			/* towards the next block that sending dirties */

	/* Loading */
	struct limosa_content staged;
	unsigned long *loaded;		/* blocks that came with the newest seed */
	u32 loaded_blocks;
	bool header_came;
	bool registers_came;
	bool ended;
	int broken;			/* errno of a refused stream */
};

struct limosa_type {
	struct mdev_type type;
	unsigned int migration_flags;
	bool logs;
	u16 number;			/* subsystem ID */
};

#define LIMOSA_VECTORS_INTX	1
#define LIMOSA_VECTORS_MSIX	4
#define LIMOSA_VECTORS		(LIMOSA_VECTORS_INTX + LIMOSA_VECTORS_MSIX + 2)

struct limosa_log_range {
	unsigned long start;
	unsigned long last;
};

/*
 * Locks, outermost first:
 *  arc_lock	one SET of the state at a time, with all the arcs of its path
 *  dma_lock	the DMA engine, what it has pinned, and the log; an arc takes it
 *		too, so DMA is over when a P2P or stopped state is reached
 *  lock	all else. Not held when user memory is touched, except by the
 *		log's report, nor while waiting for the tester.
 * A session's io lock is outside of @lock and never taken under another.
 */
struct limosa_dev {
	struct vfio_device vdev;
	const struct limosa_type *type;
	struct mutex arc_lock;
	struct mutex dma_lock;
	struct mutex lock;
	wait_queue_head_t wait;

	enum vfio_device_mig_state state;
	struct limosa_session *session;
	struct limosa_content content;
	u64 state_bytes;
	u32 block_bytes;
	u32 blocks;
	bool opened;
	bool gone;

	/* Holding and failing: points.c */
	struct limosa_rule hold;
	struct limosa_rule fail;
	struct limosa_rule error;
	u64 sequence;			/* grows when a waiter should look again */
	u64 held_sequence;		/* equals @sequence while something is held */
	struct limosa_place held;

	/* The tester's other wishes */
	u32 dirty_percent;
	u32 read_bytes_max;
	u32 write_bytes_max;
	u32 read_delay_ms;
	u32 arc_delay_ms;
	u32 log_ranges_max;
	u64 log_page_bytes;

	/* Counted for the tester */
	u64 resets;
	u64 opens;
	u64 sessions;
	u64 dirtied;
	u64 ignored;

	/* Under dma_lock */
	struct xarray pins;		/* pages left pinned, by page of IOVA */
	u64 pinned;
	bool logging;
	int log_error;
	unsigned int log_shift;
	struct xarray log;		/* written granules, by IOVA >> log_shift */
	struct limosa_log_range *log_ranges;
	u32 log_ranges_count;

	struct eventfd_ctx *vectors[LIMOSA_VECTORS];
	bool intx_masked;
	bool intx_pending;
};

static inline struct limosa_dev *to_limosa(struct vfio_device *vdev)
{
	return container_of(vdev, struct limosa_dev, vdev);
}

static inline bool limosa_runs(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_RUNNING ||
	       state == VFIO_DEVICE_STATE_RUNNING_P2P ||
	       state == VFIO_DEVICE_STATE_PRE_COPY ||
	       state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

/* The device cannot tell DMA to a peer from DMA to memory: P2P states stop both */
static inline bool limosa_may_dma(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_RUNNING ||
	       state == VFIO_DEVICE_STATE_PRE_COPY;
}

static inline bool limosa_pre_copies(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_PRE_COPY ||
	       state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static inline bool limosa_saves(enum vfio_device_mig_state state)
{
	return limosa_pre_copies(state) || state == VFIO_DEVICE_STATE_STOP_COPY;
}

/* A bijection that leaves no pattern (the finaliser of SplitMix64) */
static inline u64 limosa_mix(u64 x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/* arcs.c */
extern const struct vfio_migration_ops limosa_migration_ops;
int limosa_reset(struct limosa_dev *dev);
void limosa_break(struct limosa_dev *dev);
void limosa_close_session(struct limosa_dev *dev);
const char *limosa_state_name(enum vfio_device_mig_state state);
struct limosa_session *limosa_session_new(struct limosa_dev *dev, const char *name,
					  const struct file_operations *fops, int flags);
int limosa_session_release(struct inode *inode, struct file *filp);

/* points.c */
int limosa_pass(struct limosa_dev *dev, const struct limosa_place *here,
		struct limosa_session *session, bool wait);
u64 limosa_room(struct limosa_dev *dev, enum limosa_point point, u64 position);
int limosa_rule_parse(struct limosa_rule *rule, const char *text, bool with_error);
ssize_t limosa_rule_show(const struct limosa_rule *rule, char *buf, bool with_error);
ssize_t limosa_place_show(const struct limosa_place *place, char *buf);
void limosa_look_again(struct limosa_dev *dev);
int limosa_linger(u32 ms);

/* content.c */
int limosa_content_resize(struct limosa_dev *dev, u64 state_bytes, u32 block_bytes);
void limosa_content_clear(struct limosa_dev *dev);
u64 limosa_content_check(struct limosa_dev *dev, const struct limosa_content *content);
u32 limosa_block_length(struct limosa_dev *dev, u32 block);
void limosa_block_fill(void *to, u32 length, u64 seed, u32 block, u32 generation);
bool limosa_block_equals(const void *from, u32 length, u64 seed, u32 block, u32 generation);
void limosa_dirty(struct limosa_dev *dev, u64 blocks);
void limosa_reseed(struct limosa_dev *dev, u64 seed);
u64 limosa_record_check(const struct limosa_record *record, const void *payload);
u64 limosa_header_check(const struct limosa_header *header);

/* save.c */
struct limosa_session *limosa_save_begin(struct limosa_dev *dev);
void limosa_save_changed(struct limosa_session *session, u32 block);
void limosa_save_reinit(struct limosa_session *session);
u64 limosa_save_bytes(struct limosa_dev *dev);

/* load.c */
struct limosa_session *limosa_load_begin(struct limosa_dev *dev);
int limosa_load_finish(struct limosa_dev *dev);

/* main.c */
int limosa_init_dev(struct vfio_device *vdev);
void limosa_release_dev(struct vfio_device *vdev);
int limosa_open_device(struct vfio_device *vdev);
void limosa_close_device(struct vfio_device *vdev);

/* registers.c */
int limosa_bar0(struct limosa_dev *dev, u32 at, u8 *data, size_t count, bool write);

/* regions.c */
extern const struct vfio_device_ops limosa_device_ops;

/* irqs.c */
void limosa_raise(struct limosa_dev *dev, unsigned int index, unsigned int vector);
int limosa_irq_info(struct vfio_irq_info *info);
int limosa_irqs_set(struct limosa_dev *dev, const struct vfio_irq_set *set, void *data);
void limosa_irqs_release(struct limosa_dev *dev);
void limosa_request(struct vfio_device *vdev, unsigned int count);

/* dma.c */
#define LIMOSA_DMA_WRITE	1
#define LIMOSA_DMA_READ		2
#define LIMOSA_DMA_UNPIN	3
#define LIMOSA_DMA_WHAT		0xf
#define LIMOSA_DMA_BY_CPU	0x10	/* vfio_dma_rw() rather than pinned pages */
#define LIMOSA_DMA_KEEP		0x20	/* leave pinned */
void limosa_dma_run(struct limosa_dev *dev);
void limosa_dma_unpin_all(struct limosa_dev *dev);
void limosa_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length);

/* log.c */
extern const struct vfio_log_ops limosa_log_ops;
void limosa_log_written(struct limosa_dev *dev, u64 iova, u64 length);
void limosa_log_end(struct limosa_dev *dev);

/* attributes.c */
extern const struct attribute_group *limosa_attribute_groups[];

#endif /* LIMOSA_H */
