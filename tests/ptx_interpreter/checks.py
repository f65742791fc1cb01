"""The shadow of shared memory: races, uninitialised reads, cp.async data that is still in flight.

Shared memory is divided into granules as large as the smallest access of the kernel. Time is
counted in *epochs*: a block's epoch grows at each of its barriers, a thread's warp epoch at each
bar.warp.sync that names it. Two accesses of a granule by different threads, at least one a write
(and not both atomic), must lie in different block epochs, or, inside one warp, in different warp
epochs. Keys are `1024 epoch + thread in block`, so the newest access is the largest key and nothing
needs to be cleared.

cp.async: a copy belongs to the issuing thread's current group. The thread may touch the bytes once
it has waited for the group; others need a barrier after that wait (or bar.warp.sync inside the
warp).
"""

import numpy as np

from .errors import InFlightAccess, SharedRace, UninitialisedRead
from .memory import thread_at
from .state import WARP

KEYS = 1024  # threads of a block


class Shadow:
    """What happened to each granule of the shared memory of all blocks of a chunk."""

    def __init__(self, state, program, shared_bytes: int, stride: int):
        """`shared_bytes` of all blocks together, `stride` from one block to the next."""
        self.granule = program.granule
        self.stride = stride
        self.warp_epochs_used = program.warp_epochs
        granules = shared_bytes // self.granule
        self.thread = state.thread_in_block.astype(np.int32)
        self.block_threads = state.shape.block_threads
        self.key = np.int32(KEYS) + self.thread  # of an access now: epoch 1
        self.epoch_start = np.full(state.count, KEYS, np.int32)
        self.warp_epoch = np.zeros(state.count, np.int32)
        self.initialised = np.zeros(granules, np.bool_)
        self.writer = np.zeros(granules, np.int32)
        self.atomic = np.zeros(granules, np.int32)
        self.last_reader = np.zeros(granules, np.int32)  # the largest key
        self.first_reader = np.zeros(
            granules, np.int32
        )  # the largest mirrored key: the lowest thread
        self.write_time = np.zeros(granules, np.int32)  # warp epochs
        self.read_time = np.zeros(granules, np.int32)
        self.flight_owner = np.full(granules, -1, np.int32)  # thread of the chunk; -1: none
        self.flight_group = np.zeros(granules, np.int32)
        self.committed = np.zeros(state.count, np.int32)  # groups
        self.complete = np.zeros(state.count, np.int32)
        self.complete_at_barrier = np.zeros(state.count, np.int32)
        self.complete_at_warp_sync = np.zeros(state.count, np.int32)
        self.any_flight = False

    # Time

    def barrier(self, threads) -> None:
        """All threads of some blocks (a slice or an index array) passed a barrier."""
        self.key[threads] += KEYS
        self.epoch_start[threads] += KEYS
        self.complete_at_barrier[threads] = self.complete[threads]

    def sync_warp(self, state, mask) -> None:
        epochs = self.warp_epoch.reshape(-1, WARP)
        if mask is None:
            epochs += 1
            self.complete_at_warp_sync[:] = self.complete
            return
        chosen = mask.reshape(-1, WARP)
        newest = np.where(chosen, epochs, 0).max(axis=1, keepdims=True) + 1
        np.copyto(epochs, newest, where=chosen)
        np.copyto(self.complete_at_warp_sync, self.complete, where=mask)

    def commit(self, mask) -> None:
        np.add(self.committed, 1, out=self.committed, where=True if mask is None else mask)

    def wait(self, mask, pending: int | None) -> None:
        """All but the last `pending` groups are complete; None: all copies, committed or not."""
        where = True if mask is None else mask
        if pending is None:
            self.commit(mask)
            pending = 0
        np.maximum(self.complete, self.committed - pending, out=self.complete, where=where)

    # Accesses

    def access(self, state, threads, offsets: np.ndarray, size: int, kind: str) -> None:
        """`offsets` are bytes from the start of the chunk's shared memory."""
        if len(offsets) == 0:
            return
        count = size // self.granule
        granules = offsets // self.granule
        if count > 1:
            granules = granules[:, None] + np.arange(count)
        who = np.arange(len(self.key)) if threads is None else threads
        who = who if count == 1 else who[:, None]
        collective = kind.startswith("collective")
        what = kind.removeprefix("collective ")
        if self.any_flight:
            self._check_flight(granules, who, threads, collective, what)
        if what == "read":
            self._check_initialised(granules, threads)
            self._check_after_write(granules, who, threads, collective, what)
            self._note_read(granules, who)
        elif what == "atomic":
            self._check_initialised(granules, threads)
            self._check_after_write(granules, who, threads, False, what, atomics=False)
            self._check_after_read(granules, who, threads, False, what)
            self.atomic[granules] = self.key[who]
            self.write_time[granules] = self.warp_epoch[who]
        else:
            self._check_after_write(granules, who, threads, collective, what)
            self._check_after_read(granules, who, threads, collective, what)
            self._check_duplicates(granules, who, threads, what)
            self._note_write(granules, who, what)

    def _note_read(self, granules, who) -> None:
        key = self.key[who]
        mirrored = self.epoch_start[who] + (KEYS - 1) - self.thread[who]
        last, first = self.last_reader[granules], self.first_reader[granules]
        if self.warp_epochs_used:
            # Readers of this warp before the last bar.warp.sync no longer matter to this warp.
            now = self.warp_epoch[who]
            start = self.epoch_start[who]
            warp = self.thread[who] // WARP
            same = ((last - start) // WARP == warp) & ((KEYS - 1 - (first - start)) // WARP == warp)
            passed = same & (self.read_time[granules] < now)
            last, first = np.where(passed, 0, last), np.where(passed, 0, first)
            self.read_time[granules] = now
        # Lanes come in ascending order and the last assignment of a granule stays, so `last_reader`
        # ends with the highest thread and, assigned backwards, `first_reader` with the lowest.
        self.last_reader[granules] = np.maximum(last, key)
        self.first_reader[granules[::-1]] = np.maximum(first, mirrored)[::-1]

    def _note_write(self, granules, who, what: str) -> None:
        self.initialised[granules] = True
        if what == "copy":
            self.any_flight = True
            self.flight_owner[granules] = who
            self.flight_group[granules] = self.committed[who]
            return
        self.writer[granules] = self.key[who]
        self.write_time[granules] = self.warp_epoch[who]
        if self.any_flight:
            self.flight_owner[granules] = -1

    def _check_initialised(self, granules, threads) -> None:
        ready = self.initialised[granules]
        if not ready.all():
            lane, place = self._first(~ready, granules)
            raise UninitialisedRead(
                f"shared memory at offset {place} was never written", thread_at(threads, lane)
            )

    def _check_after_write(self, granules, who, threads, collective, what, atomics=True) -> None:
        start, key = self.epoch_start[who], self.key[who]
        for record, name in ((self.writer, "written"), (self.atomic, "changed by an atomic")):
            if record is self.atomic and not atomics:
                continue
            other = record[granules]
            clash = other >= start
            if not collective:
                clash &= other != key
            if clash.any() and self.warp_epochs_used:
                same_warp = (other - start) // WARP == self.thread[who] // WARP
                clash &= ~(same_warp & (self.write_time[granules] < self.warp_epoch[who]))
            if clash.any():
                self._race(clash, granules, threads, other - start, name, what)

    def _check_after_read(self, granules, who, threads, collective, what) -> None:
        start, key = self.epoch_start[who], self.key[who]
        last, first = self.last_reader[granules], self.first_reader[granules]
        mirrored = start + (KEYS - 1) - self.thread[who]
        clash = last >= start
        if not collective:
            clash &= (last != key) | (first != mirrored)
        if not clash.any():
            return
        lowest = KEYS - 1 - (first - start)
        if self.warp_epochs_used:
            warp = self.thread[who] // WARP
            same_warp = ((last - start) // WARP == warp) & (lowest // WARP == warp)
            clash &= ~(same_warp & (self.read_time[granules] < self.warp_epoch[who]))
        if clash.any():
            other = np.where(last != key, last - start, lowest)
            self._race(clash, granules, threads, other, "read", what)

    def _check_duplicates(self, granules, who, threads, what: str) -> None:
        """Two threads of this very instruction write one granule."""
        mine = np.broadcast_to(who, granules.shape)
        self.writer[granules] = -mine - 1  # overwritten by the caller; the last lane's mark stays
        clash = self.writer[granules] != -mine - 1
        if clash.any():
            other = np.where(clash, -self.writer[granules] - 1, 0) % self.block_threads
            self._race(clash, granules, threads, other, "written", what)
        if what == "copy":
            self.writer[granules] = 0

    def _check_flight(self, granules, who, threads, collective, what) -> None:
        owner = self.flight_owner[granules]
        if not (owner >= 0).any():
            return
        group = self.flight_group[granules]
        mine = (owner == who) & (not collective)
        done = np.where(mine, self.complete[owner], self.complete_at_barrier[owner])
        if self.warp_epochs_used:
            same_warp = owner // WARP == who // WARP
            done = np.where(same_warp, np.maximum(done, self.complete_at_warp_sync[owner]), done)
        bad = (owner >= 0) & (group >= done)
        if bad.any():
            lane, place = self._first(bad, granules)
            copier = int(owner[bad].flat[0])
            waited = self.complete[copier] > int(group[bad].flat[0])
            state = (
                "was waited for by that thread, but no barrier came since"
                if waited
                else "has not been waited for"
            )
            raise InFlightAccess(
                f"{what} of shared memory at offset {place}: the cp.async of thread "
                f"{copier % self.block_threads} of the block {state}",
                thread_at(threads, lane),
            )

    def _race(self, clash, granules, threads, other, before: str, now: str) -> None:
        lane, place = self._first(clash, granules)
        by = int(np.broadcast_to(other, clash.shape)[clash].flat[0])
        verb = {"read": "reads", "write": "writes", "copy": "copies to", "atomic": "changes"}[now]
        raise SharedRace(
            f"race: {verb} shared memory at offset {place}, {before} by thread {by} of the block "
            "with no barrier in between",
            thread_at(threads, lane),
        )

    def _first(self, bad, granules) -> tuple[int, int]:
        """(lane, byte offset in the shared memory of its block) of the first true element."""
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        return int(at[0]), int(granules[at]) * self.granule % self.stride
