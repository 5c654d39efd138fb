"""Steps of fixed shape, as a GPU runs them, against the engine's other way; here on a CPU.

A CUDA graph repeats operations, not Python: `Recording` does the same on a CPU, and the device
"meta" shows that a step needs nothing of the host. The capture itself, which needs a GPU, has
stand-ins: that a real one succeeds, and what it gains, is not tested here.
"""

import logging
from functools import partial

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimm.data.processor import user
from unimm.inference import graphs
from unimm.inference.engine import Engine, Request
from unimm.inference.graphs import ROUND, WARM, Loop, captured
from unimm.inference.sampling import Settings
from unimm.inference.stepper import Stepper
from unimm.model.int8 import quantize_decoder
from unimm.pipeline import UniMM

PROMPTS = ["a red circle", "a blue star above a green ring", "x", "a red circle"]


def requests(processor, prompts=PROMPTS, seed=3, mode="image"):
    answer = "image" if mode == "image" else "text"
    samples = [processor.encode([user(p)], answer) for p in prompts]
    return [Request(sample, mode, seed + k) for k, sample in enumerate(samples)]


def drawn(engine, settings, **how):
    answers = engine.run(requests(engine.processor, **how), settings)
    assert all(answer.done for answer in answers)
    return [answer.codes for answer in answers]


def by_graph(model, processor):
    engine = Engine(model, processor)
    engine.static = True
    return engine


def wanted(model, processor, settings, **how):
    """What the engine's other way gives."""
    return drawn(Engine(model, processor, window=1), settings, **how)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_equal_those_of_the_other_way(tiny, guidance, temperature):
    settings = Settings(guidance, temperature)
    engine = by_graph(*tiny)
    codes = drawn(engine, settings)
    assert engine._drawer.kept is not None
    assert codes == wanted(*tiny, settings)
    assert len({tuple(c) for c in codes}) >= (3 if temperature == 0 else 4)
    assert len(set(sum(codes, []))) > 8


@pytest.mark.parametrize(
    "shape",
    [{"heads": 4, "kv_heads": 1}, {"kv_heads": 4, "qk_norm": True, "attention_bias": True}],
)
@pytest.mark.parametrize("small", [False, True])
def test_heads_and_int8(shape, small):
    model, processor = tiny_model(**shape)
    if small:
        quantize_decoder(model)
    settings = Settings(2.0)
    assert drawn(by_graph(model, processor), settings) == wanted(model, processor, settings)


def test_in_bfloat16_the_cache_is_in_bfloat16():
    model, processor = tiny_model()
    model.to(torch.bfloat16)
    engine = by_graph(model, processor)
    codes = drawn(engine, Settings(2.0))
    cache = engine._drawer.kept[1].cache
    assert {t.dtype for t in cache.k + cache.v} == {torch.bfloat16}
    assert len(set(sum(codes, []))) > 8 and codes == drawn(engine, Settings(2.0))


class Recording(TorchDispatchMode):
    """Notes the operations of a function; `replay` does them again, in the same memory.

    As in a CUDA graph, what Python computed meanwhile is frozen.
    """

    def __init__(self, function):
        super().__init__()
        self.calls = []
        with self:
            function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def recorded(step, device):
    """`captured`, with a recording in place of the graph."""
    for _ in range(WARM):
        step()
    return Recording(step).replay


@pytest.mark.parametrize("settings", [Settings(3.0), Settings(1.0, 0.0)])
def test_operations_repeated_without_python_give_the_same(tiny, settings, monkeypatch):
    monkeypatch.setattr(graphs, "captured", recorded)
    steps = []
    monkeypatch.setattr(Loop, "step", lambda self, step=Loop.step: steps.append(step(self)))
    engine = by_graph(*tiny)
    assert drawn(engine, settings) == wanted(*tiny, settings)
    assert drawn(engine, settings, seed=8) == wanted(*tiny, settings, seed=8)
    assert len(steps) == WARM + 1


def test_the_host_reads_nothing_between_codes(tiny, monkeypatch):
    engine, launches = by_graph(*tiny), []

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    def unread(step, device):
        def launch():
            launches.append(1)
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "cpu", "numpy", "nonzero",
                             "__bool__", "__int__", "__float__", "__index__"):  # fmt: skip
                    patch.setattr(torch.Tensor, name, refuse)
                step()

        return launch

    monkeypatch.setattr(graphs, "captured", unread)
    assert drawn(engine, Settings(3.0)) == wanted(*tiny, Settings(3.0))
    assert len(launches) == 15  # the first codes are chosen from the prompts


class OnOneDevice(TorchDispatchMode):
    """Refuses tensors of the CPU: on a GPU, each is a copy that a graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors((args, kwargs, out)):
            assert tensor.device.type == "meta", func
        self.count += 1
        return out


@pytest.mark.parametrize("pathway", ["decoupled", "shared"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_needs_nothing_of_the_host(pathway, temperature):
    model, _ = tiny_model(pathway)
    with torch.inference_mode():
        loop = Loop(Stepper(model.to("meta")), (6, 3, 16, ROUND), Settings(3.0, temperature))
        loop.step()  # the first moves the frequencies
        with OnOneDevice() as watched:
            loop.step()
    assert watched.count > 50


class FakeCUDA:
    """What `captured` uses of torch.cuda; operations on a stream are executed, and noted."""

    def __init__(self, monkeypatch, broken=False):
        self.log, self.streams, self.broken = [], ["main"], broken
        fakes = dict(
            Stream=lambda device: FakeStream(self, "side"), CUDAGraph=lambda: FakeGraph(self),
            current_stream=lambda device: FakeStream(self, self.streams[-1]),
            stream=lambda stream: FakeContext(self, stream), graph=self.graph,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.log.append(f"capture on {stream.name}")
        return FakeContext(self, stream, graph)

    def step(self):
        self.log.append(f"step on {self.streams[-1]}")


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeContext:
    def __init__(self, cuda, stream, graph=None):
        self.cuda, self.stream, self.graph = cuda, stream, graph

    def __enter__(self):
        self.depth = len(self.cuda.streams)
        self.cuda.streams.append(self.stream.name)

    def __exit__(self, *_):
        if self.graph is not None and self.cuda.broken:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        del self.cuda.streams[self.depth :]


class FakeGraph:
    def __init__(self, cuda):
        self.replay = cuda.step


def test_a_capture_is_warm_and_on_a_stream_of_its_own(monkeypatch):
    cuda = FakeCUDA(monkeypatch)
    launch = captured(cuda.step, torch.device("cuda"))
    before = ["side waits for main", "step on side", "step on side", "capture on side"]
    assert cuda.log == [*before, "step on side", "main waits for side"]
    launch()
    assert cuda.log[-1] == "step on main" and len(cuda.log) == 7
    assert captured(cuda.step, torch.device("cpu")) == cuda.step


def test_without_a_graph_one_line_is_logged_and_steps_are_launched_singly(monkeypatch, caplog):
    cuda = FakeCUDA(monkeypatch, broken=True)
    with caplog.at_level(logging.WARNING):
        launch = captured(cuda.step, torch.device("cuda"))
    assert len(caplog.records) == 1 and caplog.text.endswith("operation not permitted\n")
    assert launch == cuda.step and cuda.streams == ["main"]
    assert cuda.log[-1] == "main waits for side"


def test_what_fails_in_a_step_itself_is_an_error(monkeypatch):
    FakeCUDA(monkeypatch)

    def step():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        captured(step, torch.device("cuda"))


def test_the_whole_call_through_a_stand_in_for_the_graph(tiny, monkeypatch):
    """`captured` with fakes that record: warm-ups leave no trace in what is drawn."""
    cuda = FakeCUDA(monkeypatch)

    def graph(graph, stream, capture_error_mode):
        graph.replay = graph.mode.replay
        return graph.mode

    def make():
        made = FakeGraph(cuda)
        made.mode = Recording(lambda: None)
        return made

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    real = captured
    monkeypatch.setattr(graphs, "captured", lambda step, _: real(step, torch.device("cuda")))
    engine = by_graph(*tiny)
    assert drawn(engine, Settings(2.0)) == wanted(*tiny, Settings(2.0))
    assert engine._drawer.kept[1].launch.__self__.calls


def test_one_loop_is_kept_and_used_again():
    model, processor = tiny_model()
    engine = by_graph(model, processor)
    first = drawn(engine, Settings(2.0))
    loop = engine._drawer.kept[1]
    longest = max(len(r.sample) for r in requests(processor))
    assert loop.cache.capacity == ROUND * -(-(longest + 15) // ROUND)
    shorter = ["y", "a cat"] * 2  # what the longer ones left in the cache must not be seen
    assert drawn(engine, Settings(2.0), prompts=shorter) == wanted(
        model, processor, Settings(2.0), prompts=shorter
    )
    assert drawn(engine, Settings(2.0), seed=9) == wanted(model, processor, Settings(2.0), seed=9)
    assert drawn(engine, Settings(2.0)) == first and engine._drawer.kept[1] is loop
    for settings in (Settings(4.0), Settings(2.0, 0.5), Settings(1.0)):
        assert drawn(engine, settings) == wanted(model, processor, settings)
        assert engine._drawer.kept[1] is not loop
        loop = engine._drawer.kept[1]
    for prompts in (["x"], ["a long tale " * 8]):  # fewer rows; a larger cache
        expected = wanted(model, processor, Settings(1.0), prompts=prompts)
        assert drawn(engine, Settings(1.0), prompts=prompts) == expected
        assert engine._drawer.kept[1] is not loop
        loop = engine._drawer.kept[1]


@pytest.mark.parametrize("pathway", ["decoupled", "shared"])
def test_a_model_that_goes_on_training_draws_with_its_new_weights(pathway, monkeypatch):
    monkeypatch.setattr(graphs, "captured", recorded)
    model, processor = tiny_model(pathway)
    engine = by_graph(model, processor)
    before = drawn(engine, Settings(2.0))
    codes = model.code_embed.weight if pathway == "decoupled" else model.decoder.embed_tokens.weight
    with torch.no_grad():
        codes.mul_(-3)  # what a table was made of
    after = drawn(engine, Settings(2.0))
    assert after != before and after == wanted(model, processor, Settings(2.0))
    drawn(engine, Settings(top_k=3))
    assert engine._drawer.kept is not None
    model.decoder.norm.weight = torch.nn.Parameter(torch.rand(32))  # elsewhere in memory
    assert drawn(engine, Settings(2.0)) == wanted(model, processor, Settings(2.0)) != after
    with torch.no_grad():
        codes.mul_(2)
    drawn(engine, Settings(top_k=3))
    assert engine._drawer.kept is None  # its memory is free


def test_calls_in_between_do_not_meet(tiny):
    engine, settings = by_graph(*tiny), Settings(2.0)
    model, processor = tiny
    seeds = (3, 50, 70)
    alone = [wanted(model, processor, settings, prompts=["a dog"], seed=s) for s in seeds]
    drawn(engine, settings, prompts=["a dog"])  # now one loop is there, for two
    one, two = (engine.stream(requests(processor, ["a dog"], s), settings) for s in seeds[:2])
    pairs = list(zip(one, two, strict=True))
    assert [answer.codes for answers in pairs[-1] for answer in answers] == alone[0] + alone[1]
    left = engine.stream(requests(processor, ["a dog"], 1), settings)
    next(left)
    left.close()  # a viewer who went away
    kept = engine._drawer.kept
    assert kept is not None
    assert drawn(engine, settings, prompts=["a dog"], seed=70) == alone[2]
    assert engine._drawer.kept[1] is kept[1]


def test_a_call_that_began_with_other_weights_leaves_none_of_them_behind(monkeypatch):
    monkeypatch.setattr(graphs, "captured", recorded)
    model, processor = tiny_model()
    engine, settings = by_graph(model, processor), Settings(2.0)
    old = engine.stream(requests(processor), settings)
    next(old)
    with torch.no_grad():
        model.code_embed.weight.mul_(-3)
    expected = wanted(model, processor, settings)
    assert drawn(engine, settings) == expected
    old.close()
    assert drawn(engine, settings) == expected


def test_a_stream_grows_code_by_code_and_a_run_fetches_once(tiny, monkeypatch):
    engine = by_graph(*tiny)
    seen = []
    for answers in engine.stream(requests(engine.processor), Settings(2.0)):
        assert len({len(a.codes) for a in answers}) == 1
        seen.append((len(answers[0].codes), answers[0].done))
    assert seen == [(k, k == 16) for k in range(1, 17)]
    assert [a.codes for a in answers] == wanted(*tiny, Settings(2.0))
    fetched = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (fetched.append(t.shape), tolist(t))[1])
    drawn(engine, Settings(2.0))
    assert fetched.count((4, 16)) == 1
    assert sum(len(shape) == 2 for shape in fetched) == 1


@pytest.mark.parametrize("every", [1, 5])
def test_partial_pictures_are_those_of_the_other_way(every):
    frames = []
    for static in (False, True):
        model = UniMM(*tiny_model())
        model.engine.static = static
        found = model.generate_stream("a dog", every, guidance=2.0, seed=5)
        frames.append([frame.tobytes() for frame in found])
    assert frames[0] == frames[1] and len(frames[0]) == (16 if every == 1 else 4)


def test_everything_else_goes_the_other_way(tiny):
    model, processor = tiny
    engine = by_graph(model, processor)
    for mode, settings in [
        ("image", Settings(2.0, top_k=5)), ("image", Settings(2.0, top_p=0.8)),
        ("text", Settings(max_text=4)), ("any", Settings(max_text=4)),
    ]:  # fmt: skip
        found = engine.run(requests(processor, mode=mode), settings)
        other = Engine(model, processor).run(requests(processor, mode=mode), settings)
        assert [a.parts for a in found] == [a.parts for a in other]
    mixed = requests(processor)[:2] + requests(processor, mode="text")[2:]
    assert [bool(a.codes) for a in engine.run(mixed, Settings(max_text=3))] == [1, 1, 0, 0]
    assert engine.run([], Settings()) == []
    with torch.autocast("cpu", torch.bfloat16):
        drawn(engine, Settings(2.0))
    engine.window = 4
    assert drawn(engine, Settings(2.0)) == wanted(model, processor, Settings(2.0))
    engine.window, engine.static = 1, None
    drawn(engine, Settings(2.0))  # on a CPU
    assert engine._drawer.kept is None
    model.to("meta")
    assert not engine._fixed(requests(processor), Settings())


def test_a_prompt_that_does_not_fit_is_refused():
    model, processor = tiny_model(max_positions=40)
    processor.max_length = 40
    with pytest.raises(ValueError, match="context"):
        by_graph(model, processor).run(requests(processor, ["a" * 25]), Settings())


def test_a_step_can_be_compiled_whole():
    """Without a break: what is traced is all that there is (the backend computes as it did)."""
    model, processor = tiny_model()
    engine = by_graph(model, processor)
    engine.compiler = partial(torch.compile, backend="eager", fullgraph=True)
    assert drawn(engine, Settings(2.0)) == wanted(model, processor, Settings(2.0))
    assert engine._drawer.kept[1].launch != engine._drawer.kept[1].step
