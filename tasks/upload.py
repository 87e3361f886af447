"""How shards are made and sent, and fetched back."""

import contextvars
import logging
import threading
from collections.abc import Mapping
from queue import Queue

from glm_quant.build import Build
from glm_quant.errors import DiskSpaceError
from glm_quant.fingerprint import fingerprint
from glm_quant.stages.base import StageResult
from glm_quant.stages.restore import elsewhere
from glm_quant.stages.targets import require_room
from glm_quant.stages.upload import UploadStage, early_targets, is_here, let_go
from tasks.attention import tell_problem
from tasks.limits import shard_seconds
from tasks.stages import quantize, restore, upload

_log = logging.getLogger("glm_quant.upload")


class RoomWatch:
    """Looks between shards whether the disks still have room for what is left, and tells it once.

    What fills a disk may go again, so nothing ends here: the shard that does not fit ends the run.
    """

    def __init__(self, build: Build) -> None:
        """Begin with enough room, which was judged before the work."""
        self._build = build
        self._is_short = False

    def look(self) -> None:
        """Compare what is left to write with what is free."""
        try:
            require_room(self._build)
        except DiskSpaceError as error:
            if not self._is_short:
                tell_problem("room", f"{error} The run goes on, and stops where the disk is full.")
            self._is_short = True
        else:
            self._is_short = False


class Sender:
    """Brings shards to one target, one after the other, in a thread beside the conversion.

    A target that fails is tried again with each new shard, the oldest first. What has left the
    disk by then it gets from publishing, when the build was fetched back. The thread is a daemon: a
    run that is stopped need not wait for a network, since uploads resume.
    """

    def __init__(self, build: Build, target: str) -> None:
        """Begin to wait for shards. To be called inside the flow, whose tasks the uploads are."""
        self._build, self._target = build, target
        self._left: list[int] = []
        self._passed_over = 0
        self._looks: Queue[threading.Event | None] = Queue()
        self._looked = threading.Event()
        self._looked.set()
        self.failed = False  # its last try
        self._told_error = ""
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), daemon=True).start()

    def send(self, shard: int) -> None:
        """Take a finished shard; returns at once."""
        self._left.append(shard)
        self._looked = threading.Event()
        self._looks.put(self._looked)

    def wait(self) -> None:
        """Wait until all shards were sent, or the target has failed or hung for too long."""
        seconds = sum(shard_seconds(self._build, shard) for shard in tuple(self._left))
        if not self._looked.wait(seconds):
            _log.warning("%s: no upload ended for %.0f s", self._target, seconds)
            self.failed = True

    def finish(self) -> None:
        """Wait likewise, and take no more."""
        self._looks.put(None)
        self.wait()
        lacking = len(self._left) + self._passed_over
        if lacking:
            _log.warning("%s lacks %d shards; publishing sends them again", self._target, lacking)

    def _work(self) -> None:
        while (looked := self._looks.get()) is not None:
            # Behind a target that does not answer shards pile up: one try for all of them.
            if not self.failed or self._looks.empty():
                self._send_left()
            looked.set()

    def _send_left(self) -> None:
        while self._left:
            if self._has_it(self._left[0]) or is_here(self._build, self._left[0]):
                self.failed = not self._is_sent(self._left[0])
                if self.failed:
                    return
            else:
                self._passed_over += 1
            del self._left[0]

    def _has_it(self, shard: int) -> bool:
        return UploadStage(self._build, shard, self._target).current() is not None

    def _is_sent(self, shard: int) -> bool:
        try:
            upload(self._build, shard, self._target)
        except Exception as error:  # nothing may end this thread: others wait for it
            self._tell(error)
            return False
        return True

    def _tell(self, error: Exception) -> None:
        """Show on the run's page that uploads fail, once for each way in which they do."""
        if str(error) == self._told_error:
            return
        self._told_error = str(error)
        tell_problem(
            f"upload-{fingerprint(self._target)[:12]}",
            f"The upload to {self._target} failed: {error} The conversion goes on, and this "
            "target is tried again with each new shard. If that does not help, correct it now: "
            "publishing there will fail in the end.",
        )


def make_shards(build: Build) -> list[StageResult]:
    """Make every shard; each is uploaded while the next ones are made.

    An upload that fails stops nothing: publishing does it again, and says what is wrong. Where
    shards leave the disk, a shard waits until the one before has been sent, or its target failed;
    it leaves then if another target has it, so that the disk stays small whichever target is away.
    """
    made: list[StageResult] = []
    senders = {target: Sender(build, target) for target in early_targets(build)}
    room = RoomWatch(build)
    for shard in range(len(build.plan.shards)):
        room.look()
        made.append(quantize(build, shard))
        if build.evicts_shards:
            for sender in senders.values():
                if not sender.failed:
                    sender.wait()
            _go_without(build, senders)
        for sender in senders.values():
            sender.send(shard)
    for sender in senders.values():
        sender.finish()
    _go_without(build, senders)
    return made


def _go_without(build: Build, senders: Mapping[str, Sender]) -> None:
    """Let go what waits for targets that have failed."""
    failed = {target for target, sender in senders.items() if sender.failed}
    if failed:
        let_go(build, range(len(build.plan.shards)), failed)


def restore_shards(build: Build) -> list[StageResult]:
    """Fetch back the shards that were evicted."""
    return [restore(build, shard) for shard in elsewhere(build)]
