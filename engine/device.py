"""A runner on threads of its own: whoever decides on steps never waits for one.

    Device.launch ──▶ launching thread ──▶ runner.launch ──▶ collecting thread ──▶ runner.collect ──▶ on_done

Where the runner takes no steps ahead, one thread does both. Steps are launched, and end, in the order in which they came. A step
that raises fails its handle, not the thread.

Neighbours: `engine.engine` takes it for its runner; `instance.loop` is woken by `on_done`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from core.errors import EngineFault
from core.layout import KVLayout
from engine.plan import Handle, LayerListener, ModelRunner, StepPlan, StepResult


class DeviceStep:
    """A step on its way through the threads."""

    def __init__(self, plan: StepPlan, on_layer: LayerListener | None) -> None:
        self.plan = plan
        self.on_layer = on_layer
        self.handle: Handle | None = None
        self._over = threading.Event()
        self._outcome: StepResult | BaseException = EngineFault("the step is not over")

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def end(self, outcome: StepResult | BaseException) -> None:
        """Once."""
        self._outcome = outcome
        self._over.set()

    def result(self) -> StepResult:
        """Wait for it. Raises whatever broke the step."""
        self._over.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


class Device:
    """A `ModelRunner` whose `launch` returns at once, around one whose need not. Call it from one thread.

    Args:
        runner: used by nobody else.
        bind_thread: called once on each thread that uses the runner.
        on_done: called on such a thread whenever a step is over, failed ones too.
    """

    def __init__(
        self,
        runner: ModelRunner,
        bind_thread: Callable[[], None] = lambda: None,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._bind_thread = bind_thread
        self._on_done = on_done
        self._launching: SimpleQueue[DeviceStep | None] = SimpleQueue()
        self._collecting: SimpleQueue[DeviceStep | None] = SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._launch_all, name="device-launch", daemon=True)]
        if runner.steps_ahead > 0:
            self._threads.append(threading.Thread(target=self._collect_all, name="device-collect", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def layout(self) -> KVLayout:
        return self._runner.layout

    @property
    def num_blocks(self) -> int:
        return self._runner.num_blocks

    @property
    def max_model_len(self) -> int:
        return self._runner.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._runner.eos_token_ids

    @property
    def steps_ahead(self) -> int:
        return self._runner.steps_ahead

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> DeviceStep:
        step = DeviceStep(plan, on_layer)
        if self._closed:
            step.end(EngineFault("the device is closed"))
            return step
        self._launching.put(step)
        return step

    def collect(self, handle: Handle) -> StepResult:
        if not isinstance(handle, DeviceStep):
            raise TypeError(f"Got a {type(handle).__name__} but expected a step that was launched here")
        return handle.result()

    def close(self, timeout_s: float | None = None) -> bool:
        """Let what is launched end, and then the threads; what is launched afterwards fails. False if that took too long: then
        the device is stuck, and its threads end with the process."""
        self._closed = True
        self._launching.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    # --- the threads --------------------------------------------------------------------------------------------------

    def _launch_all(self) -> None:
        self._bind_thread()
        ahead = self._runner.steps_ahead > 0
        while (step := self._launching.get()) is not None:
            try:
                step.handle = self._runner.launch(step.plan, step.on_layer)
            except BaseException as error:  # the boundary of the thread: whoever waits for the step is told
                step.end(error)
            if ahead:
                self._collecting.put(step)
            else:
                self._collect(step)
        self._collecting.put(None)

    def _collect_all(self) -> None:
        self._bind_thread()
        while (step := self._collecting.get()) is not None:
            self._collect(step)

    def _collect(self, step: DeviceStep) -> None:
        if step.handle is not None:
            try:
                step.end(self._runner.collect(step.handle))
            except BaseException as error:  # the boundary of the thread: whoever waits for the step is told
                step.end(error)
        self._on_done()
