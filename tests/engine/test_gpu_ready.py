"""What a GPU asks of a tick, checked without one: G1 to G5 of the plan.

G1 the whole tick in bfloat16 on the meta device, where a table left on the CPU or a value read back raises. G2 one
graph for a pass, and none made anew in the steady state. G3 no read to the host, and a bound on operations. G4 memory
at constant addresses, none of it growing. G5 no result that depends on what a buffer held before.
"""

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.api import StreamParams, WeightedPrompt
from engine.config import CacheConfig, MotionConfig, SamplingConfig
from engine.lanes import Lanes
from engine.pipeline import Mode, Pipeline
from engine.session import SessionState
from engine.wan.presets import TransformerConfig
from engine.wan.untrained import SMALL_WAN, untrained_model, untrained_wan_model
from engine.wan.weights import Model
from tests.engine.streams import FLOW, TINY, camera, opened, pooled_model, relative_rms

MODES: tuple[Mode, ...] = ("sequential", "batch")
CACHES: dict[str, CacheConfig] = {
    "relative": CacheConfig(),
    "refresh": CacheConfig(positions="refresh", refresh_at=8, sink_refresh=0.5),
    "absolute": CacheConfig(positions="absolute", sink_ema=0.9),
}
# Measured: 45 that start work and 46 views in a block of Wan's kind; the public code has 118 to 180 that start work.
OPERATIONS_PER_BLOCK = 40


def pooled(mode: Mode, *, layers: int = 2, cache: str = "relative", **options: Any) -> Pipeline:
    config = FLOW.model_copy(update={"layers": layers})
    return Pipeline(pooled_model(config), 32, 32, mode=mode, streams=3, cache=CACHES[cache], **options)


def warm(pipeline: Pipeline, state: SessionState, chunks: int = 9) -> list[Tensor]:
    """Fill the window, and render on."""
    shown = []
    for chunk in range(chunks):
        frames = pipeline.upload(camera(4 if chunk else 5, chunk, height=32))
        shown += [done.frames for done in pipeline.tick([(state, frames)]) if done.frames is not None]
    return shown


# --- G1


def tick_on_meta(model: Model, mode: Mode, chunks: int, **options: Any) -> None:
    """Two streams with everything that can happen to them; every result on the device, in its dtype."""
    pipeline = Pipeline(model, 32, 32, mode=mode, streams=2, **options)
    states = [pipeline.open(StreamParams(prompt=prompt, steps=3, strength=0.7)) for prompt in ("neon", "ink")]
    shown = 0
    for chunk in range(chunks):
        frames = torch.empty(4 if chunk else 5, 32, 32, 3, dtype=torch.uint8, device="meta")
        if chunk == chunks - 3:
            pair = (WeightedPrompt(text="neon"), WeightedPrompt(text="ink"))
            change = StreamParams(blend=pair, transition_chunks=1, seed=8, recache=True, steps=2)
            pipeline.set_params(states[0], change)
        if chunk == chunks - 2:
            pipeline.reanchor(states[1])
        for done in pipeline.tick([(state, frames) for state in states]):
            assert done.frames is not None
            assert done.figures is not None
            assert (done.frames.shape[1:], done.frames.device.type) == ((32, 32, 3), "meta")
            assert (done.frames.dtype, done.figures.dtype) == (torch.uint8, torch.float32)
            shown += 1
        assert {item.clean.dtype for state in states for item in state.in_flight} <= {torch.bfloat16}
    assert shown >= 2 * (chunks - 2)
    assert {store.dtype for store in (*pipeline.pool.keys, *pipeline.pool.values)} == {torch.bfloat16}


MOTIONS = {"pixels": MotionConfig(), "latents": MotionConfig(source="latents", window=3)}


@pytest.mark.parametrize(
    ("mode", "cache", "motion"),
    [
        ("sequential", "relative", "pixels"),
        ("sequential", "refresh", "latents"),
        ("batch", "refresh", "pixels"),
        ("batch", "absolute", "latents"),
    ],
)
def test_the_whole_tick_runs_on_another_device_and_dtype(mode: Mode, cache: str, motion: str) -> None:
    model = pooled_model(FLOW.model_copy(update={"layers": 1}), device="meta", dtype=torch.bfloat16)
    sampling = model.config.sampling.model_copy(update={"motion": MOTIONS[motion]})
    tick_on_meta(model, mode, 9, cache=CACHES[cache], sampling=sampling)


@pytest.mark.parametrize(("mode", "kind"), [("sequential", "tiny"), ("batch", "wan")])
def test_the_real_autoencoders_run_on_another_device_and_dtype(mode: Mode, kind: str) -> None:
    device, dtype = torch.device("meta"), torch.bfloat16
    one = {"layers": 1}
    if kind == "tiny":
        model = untrained_model(TINY.model_copy(update=one), device=device, dtype=dtype)
    else:
        model = untrained_wan_model(SMALL_WAN.model_copy(update=one), device=device, dtype=dtype)
    tick_on_meta(model, mode, 4)


def test_the_meta_device_does_find_a_read_to_the_host() -> None:
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.zeros(1, device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.zeros(2, device="meta") + torch.zeros(2)


# --- G2


def graphs() -> int:
    """Graphs compiled since the last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_pass_is_one_graph_equal_to_eager_and_is_not_compiled_again(compiler: None) -> None:
    """fullgraph raises at a break; the window fills, then nothing new is compiled, whoever comes."""
    compiled, eager = pooled("batch", layers=1, compile_pass=True), pooled("batch", layers=1)
    params = StreamParams(prompt="neon", steps=2, seed=3)
    pairs = [(pipeline, pipeline.open(params)) for pipeline in (compiled, eager)]
    ours, plain = (warm(pipeline, state) for pipeline, state in pairs)
    assert len(ours) == len(plain) >= 8
    for one, two in zip(ours, plain, strict=True):
        assert (one.int() - two.int()).abs().max() <= 1
    # One for the full window of both steps; while it filled, passes ran as they are.
    assert graphs() == 1
    # The steady state: more chunks, a live change (two prompts in one pass for a while), a stream on other rows.
    compiled.batch.seal()
    before, state = graphs(), pairs[0][1]
    for seed in range(8):
        if seed == 4:
            compiled.set_params(state, params.model_copy(update={"prompt": "ink", "strength": 0.5}))
        compiled.tick([(state, compiled.upload(camera(4, seed, height=32)))])
    warm(compiled, compiled.open(params))
    assert graphs() == before


@pytest.mark.slow
def test_only_full_windows_are_compiled_and_no_new_shape_after_the_warm_up(compiler: None) -> None:
    pipeline = pooled("sequential", layers=1, compile_pass=True)
    states = [pipeline.open(StreamParams(prompt="neon", steps=1, seed=seed)) for seed in range(2)]
    warm(pipeline, states[0], chunks=2)
    assert graphs() == 0
    warm(pipeline, states[0])
    assert graphs() == 1
    pipeline.batch.seal()
    warm(pipeline, states[1])
    frames = pipeline.upload(camera(4, 3, height=32))
    for _ in range(4):
        pipeline.tick([(state, frames) for state in states])
    assert graphs() == 1


# --- G3


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name, those made of others taken apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode linear, flatten and their like arrive whole.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        """Those whose result the host must wait for."""
        return sum(
            count
            for name, count in self.names.items()
            if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal"))
        )


VIEWS = ("view", "unsqueeze", "expand", "permute", "transpose", "select", "slice", "split", "unbind", "detach", "alias",
         "squeeze", "t.", "as_strided", "_unsafe_view", "narrow")  # fmt: skip


def launching(operations: Operations) -> int:
    """Operations that start work on a device, which views do not."""
    return sum(count for name, count in operations.names.items() if not name.removeprefix("aten.").startswith(VIEWS))


def counted(pipeline: Pipeline, states: list[SessionState]) -> Operations:
    frames = pipeline.upload(camera(4, 77, height=32))
    operations = Operations()
    with operations:
        pipeline.tick([(state, frames) for state in states])
    return operations


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_steady_tick_reads_nothing_back_to_the_host(mode: Mode, cache: str) -> None:
    pipeline = pooled(mode, cache=cache)
    states = [opened(pipeline, prompt=prompt, steps=3) for prompt in ("neon", "ink")]
    for state in states:
        warm(pipeline, state)
    assert counted(pipeline, states).reads == 0
    pipeline.set_params(states[0], states[0].params.model_copy(update={"prompt": "painting", "seed": 4}))
    assert counted(pipeline, states).reads == 0


def test_a_steady_tick_of_the_embedded_model_reads_nothing_back() -> None:
    pipeline = Pipeline(untrained_model(TINY), 32, 32)
    state = opened(pipeline, steps=3)
    warm(pipeline, state)
    assert counted(pipeline, [state]).reads == 0


def test_a_read_to_the_host_is_counted() -> None:
    operations = Operations()
    with operations:
        assert torch.ones(3).sum().item() == 3
        assert torch.ones(3).nonzero().shape == (3, 1)
    assert operations.reads == 2


@pytest.mark.parametrize("mode", MODES)
def test_operations_per_block_are_bounded(mode: Mode) -> None:
    def tick_of(layers: int) -> int:
        pipeline = pooled(mode, layers=layers)
        state = opened(pipeline, steps=2)
        warm(pipeline, state)
        return launching(counted(pipeline, [state]))

    passes = 1 if mode == "batch" else 2
    per_block = (tick_of(3) - tick_of(2)) / passes
    assert 10 < per_block <= OPERATIONS_PER_BLOCK


def test_operations_do_not_grow_with_the_streams_of_a_pass_nor_with_the_length_of_one() -> None:
    pipeline = pooled("sequential", layers=4)
    states = [opened(pipeline, steps=1) for _ in range(3)]
    for state in states:
        warm(pipeline, state)
    one, three = (launching(counted(pipeline, states[:count])) for count in (1, 3))
    # Each stream has its own autoencoder calls; the passes through the blocks are shared.
    alone = pooled("sequential", layers=1)
    short = opened(alone, steps=1)
    warm(alone, short)
    outside = launching(counted(alone, [short]))
    assert three - one < 2 * outside
    for _ in range(30):
        counted(pipeline, states[:1])
    assert launching(counted(pipeline, states[:1])) == one


# --- G4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", CACHES)
def test_the_pools_memory_stays_where_it_is_and_nothing_grows(mode: Mode, cache: str) -> None:
    pipeline = pooled(mode, cache=cache)
    state = opened(pipeline, steps=2)
    warm(pipeline, state, chunks=20)

    def addresses() -> list[int]:
        pool = pipeline.pool
        return [
            x.untyped_storage().data_ptr() for x in (*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks)
        ]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    before, count = addresses(), tensors()
    for _ in range(20):
        counted(pipeline, [state])
    assert addresses() == before
    assert tensors() == count
    kept = [torch.zeros(1)]
    assert tensors() == count + len(kept)


# --- lanes


class TracedLanes(Lanes):
    """Says which lane work is queued on, without a GPU."""

    current = "none"

    @contextlib.contextmanager
    def _queued(self, lane: str) -> Iterator[None]:
        outer, self.current = self.current, lane
        yield
        self.current = outer

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with self._queued("aside"):
            yield

    def encode(self) -> contextlib.AbstractContextManager[None]:
        return self._queued("encode")

    def denoise(self, inputs: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
        return self._queued("denoise")

    def decode(self, *inputs: Tensor) -> contextlib.AbstractContextManager[None]:
        return self._queued("decode")


class TouchedOn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the lanes on which any of some tensors is read or written."""

    def __init__(self, tensors: Iterable[Tensor], lanes: TracedLanes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._lanes = lanes
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_ = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        if any(x.untyped_storage().data_ptr() in self._storages for x in given_):
            self.seen.add(self._lanes.current)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", CACHES)
def test_the_cache_is_touched_on_the_denoise_lane_and_between_passes_alone(mode: Mode, cache: str) -> None:
    """On a GPU lanes run side by side: what two of them touch is a race."""
    pipeline = pooled(mode, cache=cache)
    lanes = pipeline.lanes = TracedLanes(torch.device("cpu"))
    pool = pipeline.pool
    touched = TouchedOn((*pool.keys, *pool.values, pool.held, pool.next, pool.sink_looks), lanes)
    with touched:
        state = pipeline.open(StreamParams(prompt="neon", steps=2))
        warm(pipeline, state)
        pipeline.set_params(state, StreamParams(prompt="ink", steps=3, recache=True))
        warm(pipeline, state, chunks=3)
        pipeline.reanchor(state)
        warm(pipeline, state, chunks=3)
        pipeline.reset(state)
        warm(pipeline, state, chunks=2)
    assert touched.seen == {"denoise", "aside"}


def test_prompts_are_made_between_passes_and_read_on_the_denoise_lane() -> None:
    pipeline = pooled("sequential")
    lanes = pipeline.lanes = TracedLanes(torch.device("cpu"))
    state = opened(pipeline)
    context = state.prompts.context
    assert context is not None
    read = TouchedOn((*context.keys, *context.values), lanes)
    with read:
        warm(pipeline, state, chunks=3)
    assert read.seen == {"denoise"}
    block = pipeline.model.transformer.blocks[0]
    made = TouchedOn([block.get_parameter("cross_attn.kv.weight")], lanes)
    with made:
        pipeline.set_params(state, StreamParams(prompt="ink"))
        warm(pipeline, state, chunks=3)
    assert made.seen == {"aside"}


# --- G5


class Poison(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever is allocated without a value is full of NaN, or of 255."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("aten.empty", "aten.new_empty")) and out.numel():
            out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["pooled", "tiny"])
def test_poisoned_buffers_change_no_result(mode: Mode, kind: str) -> None:
    """Uploads, downloads and outputs of one tick are overwritten before the next; fresh memory is full of NaN."""

    def run(poisoned: bool) -> list[Tensor]:
        pipeline = pooled(mode) if kind == "pooled" else Pipeline(untrained_model(TINY), 32, 32, mode=mode, streams=2)
        states = [pipeline.open(StreamParams(prompt=prompt, steps=2)) for prompt in ("neon", "ink")]
        kept = []
        for chunk in range(9):
            given = [camera(4 if chunk else 5, 10 * chunk + which, height=32) for which in range(2)]
            uploads = [pipeline.upload(frames) for frames in given]
            jobs = list(zip(states, uploads, strict=True))
            if poisoned:
                with Poison():  # type: ignore[no-untyped-call]
                    done = pipeline.tick(jobs)
            else:
                done = pipeline.tick(jobs)
            for each in done:
                assert each.frames is not None
                assert each.figures is not None
                downloads = [pipeline.lanes.download(x).wait() for x in (each.frames, each.figures)]
                kept += [x.clone() for x in downloads]
                if poisoned:
                    with torch.inference_mode():
                        for buffer in (each.frames, each.figures, *downloads):
                            buffer.fill_(float("nan") if buffer.is_floating_point() else 255)
            if poisoned:
                for frames, upload in zip(given, uploads, strict=True):
                    frames[:] = 255
                    upload.fill_(255)
        return kept

    clean, poisoned = run(poisoned=False), run(poisoned=True)
    assert len(clean) == len(poisoned) > 20
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_poison_does_reach_fresh_memory() -> None:
    with Poison():  # type: ignore[no-untyped-call]
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()


def test_memory_that_no_frame_was_written_to_is_never_read() -> None:
    """The empty part of a window may hold anything finite: here it is 1e30."""
    config = TransformerConfig.model_validate(FLOW.model_dump() | {"layers": 1})
    runs = []
    for filled in (0.0, 1e3):
        pipeline = Pipeline(pooled_model(config), 32, 32, streams=2, sampling=SamplingConfig())
        states = [opened(pipeline, prompt=prompt) for prompt in ("neon", "ink")]
        for store in (*pipeline.pool.keys, *pipeline.pool.values):
            store.fill_(filled)
        warm(pipeline, states[0], chunks=3)
        frames = pipeline.upload(camera(5, 3, height=32))
        runs.append([x.frames for x in pipeline.tick([(state, frames) for state in states])])
    for one, two in zip(*runs, strict=True):
        assert one is not None
        assert two is not None
        assert relative_rms(one.float(), two.float()) < 1e-6
