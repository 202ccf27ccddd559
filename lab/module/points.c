// SPDX-License-Identifier: GPL-2.0-only
/*
 * Points: where the tester can hold the device, or make it fail or break.
 *
 * A rule is armed through an attribute and names a point. Whoever passes a
 * held point sleeps until the rule changes, the device or the session goes, or
 * a signal comes. All of this is the tester's to see, through "held".
 */
#include <linux/delay.h>
#include <linux/kernel.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "limosa.h"

#define LIMOSA_LINGER_MS_MAX	10000U

static const char *const limosa_points[] = {
	[LIMOSA_AT_ARC] = "arc",
	[LIMOSA_AT_READ] = "read",
	[LIMOSA_AT_WRITE] = "write",
	[LIMOSA_AT_INFO] = "info",
	[LIMOSA_AT_GET] = "get",
	[LIMOSA_AT_SIZE] = "size",
	[LIMOSA_AT_START] = "start",
	[LIMOSA_AT_STOP] = "stop",
	[LIMOSA_AT_REPORT] = "report",
	[LIMOSA_AT_RESET] = "reset",
};

static const char *const limosa_states[] = {
	[VFIO_DEVICE_STATE_ERROR] = "ERROR",
	[VFIO_DEVICE_STATE_STOP] = "STOP",
	[VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
	[VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
	[VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
	[VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
	[VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

const char *limosa_state_name(enum vfio_device_mig_state state)
{
	return state < ARRAY_SIZE(limosa_states) ? limosa_states[state] : "*";
}

/* -1 is any state, spelt "*" */
static int limosa_state_parse(const char *text, int *state)
{
	*state = -1;
	if (!strcmp(text, "*"))
		return 0;
	*state = match_string(limosa_states, ARRAY_SIZE(limosa_states), text);
	return *state < 0 ? -EINVAL : 0;
}

/* "STOP>STOP_COPY", "*>RESUMING", "read", "write@4096", "report" */
static int limosa_place_parse(struct limosa_place *place, char *text)
{
	char *rest;
	int ret;

	memset(place, 0, sizeof(*place));
	rest = strchr(text, '>');
	if (rest) {
		*rest++ = '\0';
		place->point = LIMOSA_AT_ARC;
		ret = limosa_state_parse(text, &place->from);
		return ret ?: limosa_state_parse(rest, &place->to);
	}

	rest = strchr(text, '@');
	if (rest)
		*rest++ = '\0';
	ret = match_string(limosa_points, ARRAY_SIZE(limosa_points), text);
	if (ret <= LIMOSA_AT_ARC)
		return -EINVAL;
	place->point = ret;
	if (!rest)
		return 0;
	if (place->point != LIMOSA_AT_READ && place->point != LIMOSA_AT_WRITE)
		return -EINVAL;
	return kstrtou64(rest, 0, &place->at);
}

/* "none", a place, or with an error a place, ":", an errno, and perhaps ":" and how often */
int limosa_rule_parse(struct limosa_rule *rule, const char *text, bool with_error)
{
	struct limosa_rule parsed = { .armed = true };
	char copy[64], *cursor = copy, *place, *word;
	int ret;

	if (strscpy(copy, skip_spaces(text), sizeof(copy)) < 0)
		return -EINVAL;
	strim(copy);
	if (!*copy || !strcmp(copy, "none")) {
		memset(rule, 0, sizeof(*rule));
		return 0;
	}

	place = strsep(&cursor, ":");
	word = strsep(&cursor, ":");
	if (with_error != !!word)
		return -EINVAL;
	if (word) {
		ret = kstrtoint(word, 0, &parsed.error);
		if (ret)
			return ret;
		if (parsed.error <= 0 || parsed.error > MAX_ERRNO)
			return -EINVAL;
	}
	if (cursor) {
		ret = kstrtou32(cursor, 0, &parsed.times);
		if (ret)
			return ret;
		if (!parsed.times)
			return -EINVAL;
	}
	ret = limosa_place_parse(&parsed.place, place);
	if (ret)
		return ret;
	*rule = parsed;
	return 0;
}

ssize_t limosa_place_show(const struct limosa_place *place, char *buf)
{
	if (place->point == LIMOSA_AT_ARC)
		return sysfs_emit_at(buf, 0, "%s>%s", limosa_state_name(place->from),
				     limosa_state_name(place->to));
	if (place->point == LIMOSA_AT_READ || place->point == LIMOSA_AT_WRITE)
		return sysfs_emit_at(buf, 0, "%s@%llu", limosa_points[place->point], place->at);
	return sysfs_emit_at(buf, 0, "%s", limosa_points[place->point]);
}

ssize_t limosa_rule_show(const struct limosa_rule *rule, char *buf, bool with_error)
{
	ssize_t length;

	if (!rule->armed)
		return sysfs_emit(buf, "none\n");
	length = limosa_place_show(&rule->place, buf);
	if (with_error)
		length += sysfs_emit_at(buf, length, ":%d", rule->error);
	if (rule->times)
		length += sysfs_emit_at(buf, length, ":%u", rule->times);
	return length + sysfs_emit_at(buf, length, "\n");
}

static bool limosa_applies(const struct limosa_rule *rule, const struct limosa_place *here)
{
	const struct limosa_place *place = &rule->place;

	if (!rule->armed || place->point != here->point)
		return false;
	if (here->point == LIMOSA_AT_ARC)
		return (place->from < 0 || place->from == here->from) &&
		       (place->to < 0 || place->to == here->to);
	return here->at >= place->at;
}

static int limosa_hit(struct limosa_rule *rule, const struct limosa_place *here)
{
	if (!limosa_applies(rule, here))
		return 0;
	if (rule->times && !--rule->times)
		rule->armed = false;
	return -rule->error;
}

/* Whoever waits for the device looks at it again; nothing is held for the moment */
void limosa_look_again(struct limosa_dev *dev)
{
	lockdep_assert_held(&dev->lock);
	WRITE_ONCE(dev->sequence, dev->sequence + 1);
	wake_up_all(&dev->wait);
}

/*
 * Passes a point: 0, or what the caller has to fail with. @session, if any, is
 * the one whose end ends the wait. Without @wait a held point is -EAGAIN.
 */
int limosa_pass(struct limosa_dev *dev, const struct limosa_place *here,
		struct limosa_session *session, bool wait)
{
	u64 resets, sequence;
	int ret;

	guard(mutex)(&dev->lock);
	resets = dev->resets;
	while (limosa_applies(&dev->hold, here)) {
		if (dev->gone || (session && session->dead))
			break;
		if (dev->resets != resets)
			return -ECANCELED;
		if (!wait)
			return -EAGAIN;

		sequence = dev->sequence;
		dev->held = *here;
		WRITE_ONCE(dev->held_sequence, sequence);
		wake_up_all(&dev->wait);
		mutex_unlock(&dev->lock);
		ret = wait_event_interruptible(dev->wait, READ_ONCE(dev->sequence) != sequence);
		mutex_lock(&dev->lock);
		if (ret) {
			if (dev->held_sequence == dev->sequence)
				WRITE_ONCE(dev->held_sequence, 0);
			return ret;
		}
	}

	if (dev->gone || (session && session->dead))
		return -ENODEV;
	ret = limosa_hit(&dev->error, here);
	if (ret) {
		limosa_break(dev);
		return ret;
	}
	return limosa_hit(&dev->fail, here);
}

/* A device that takes its time, though never so long that nobody can wait for it */
int limosa_linger(u32 ms)
{
	if (ms && msleep_interruptible(min(ms, LIMOSA_LINGER_MS_MAX)))
		return -EINTR;
	return 0;
}

static u64 limosa_rule_room(const struct limosa_rule *rule, enum limosa_point point, u64 position)
{
	if (!rule->armed || rule->place.point != point)
		return U64_MAX;
	return rule->place.at > position ? rule->place.at - position : 0;
}

/* How many bytes may go through the session before a rule is due */
u64 limosa_room(struct limosa_dev *dev, enum limosa_point point, u64 position)
{
	lockdep_assert_held(&dev->lock);
	return min3(limosa_rule_room(&dev->hold, point, position),
		    limosa_rule_room(&dev->error, point, position),
		    limosa_rule_room(&dev->fail, point, position));
}
