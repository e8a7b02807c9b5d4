"""`lowbit.save` and `lowbit.load_into`: modules that the user's own code builds."""

import copy
import json
import warnings

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lowbit
from lowbit.container import FORMAT, checksum, read
from lowbit.errors import CheckpointError, LowbitError
from lowbit.nn.packed import PackedLayer
from lowbit.quantizers import LSQ, DenseShift, StatsQ, get, names


class CNN(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 16, 3, stride=2)])
        self.head = nn.Linear(16, classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.body:
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A transformer block of nn.Linear's, between an embedding and a head that are tied."""

    def __init__(self, width=16, words=20):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return self.head(x + self.fc2(self.fc1(self.norm2(x)).relu())).mean(1)


def images(n=4):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


MODULES = {
    "CNN": (CNN, images),
    "transformer": (Block, lambda: torch.arange(12).reshape(4, 3)),
    "torchvision": (lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=10), images),
}
CONFIG = lowbit.QuantConfig(weight=StatsQ(bits=3), activation=LSQ(bits=8), first_last=8)


def trained(make, x, config=CONFIG):
    """Two steps."""
    torch.manual_seed(0)
    model = lowbit.calibrate(lowbit.quantize_(make(), config), x)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), torch.arange(4)).backward()
        optimizer.step()
    return model.eval()


def same(one, other, x):
    with torch.no_grad():
        a, b = one(x), other(x)
    return a.dtype == b.dtype and a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("state", ["float", "quantized", "packed", "packed without example"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_module_comes_back_to_the_bit(kind, state, tmp_path):
    make, inputs = MODULES[kind]
    x = inputs()
    model = make().eval() if state == "float" else trained(make, x)
    if state.startswith("packed"):
        model = lowbit.pack(model, x if state == "packed" else None)
        assert sum(isinstance(layer, PackedLayer) for layer in model.modules()) >= 3
    path = lowbit.save(model, tmp_path / "m.safetensors")
    torch.manual_seed(1)
    fresh = make()
    assert not same(fresh.eval(), model, x)
    again = lowbit.load_into(fresh, path)
    assert again is fresh and not again.training and same(again, model, x)
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in model.modules()]
    assert path.read_bytes() == lowbit.save(again, tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("kind", MODULES)
def test_modules_are_fused_before_and_after_their_file(kind, tmp_path):
    make, inputs = MODULES[kind]
    x = inputs()
    packed = lowbit.pack(trained(make, x), x)
    again = lowbit.load_into(make(), lowbit.save(packed, tmp_path / "m.safetensors"))
    for model in (packed, again):
        fused = lowbit.fuse(model, x)
        assert same(fused, packed, x)
    with pytest.raises(LowbitError, match="fused model cannot be saved"):
        lowbit.save(fused, tmp_path / "fused.safetensors")


@pytest.mark.parametrize("weight", names("weight"))
def test_every_method_goes_into_a_module(weight, tmp_path):
    config = lowbit.QuantConfig(weight=get(weight)(), activation=LSQ(bits=4), first_last=8)
    model = trained(CNN, images(), config)
    again = lowbit.load_into(CNN(), lowbit.save(model, tmp_path / "m.safetensors"))
    assert same(again, model, images())
    twice = lowbit.quantize_(CNN(), config)  # quantized by the same code already
    assert same(lowbit.load_into(twice, tmp_path / "m.safetensors"), model, images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pack", [False, True])
def test_a_module_of_another_dtype_comes_back_to_the_bit(pack, dtype, tmp_path):
    x = images().to(dtype)

    def make():
        return CNN().to(dtype)

    model = lowbit.calibrate(lowbit.quantize_(make(), CONFIG), x).eval()
    model = lowbit.pack(model, x) if pack else model
    path = lowbit.save(model, tmp_path / "m.safetensors")
    assert same(lowbit.load_into(make(), path), model, x)
    with pytest.raises(CheckpointError, match="float32"):
        lowbit.load_into(CNN(), path)


def test_a_model_that_was_converted_after_quantize_comes_back(tmp_path):
    x = images().bfloat16()
    model = lowbit.calibrate(lowbit.quantize_(CNN(), CONFIG), images()).eval().bfloat16()
    path = lowbit.save(model, tmp_path / "m.safetensors")
    assert same(lowbit.load_into(CNN().bfloat16(), path), model, x)


@pytest.mark.parametrize("pack", [False, True])
def test_half_size_files_go_into_float_modules(pack, tmp_path):
    model = trained(CNN, images())
    model = lowbit.pack(model, images()) if pack else model
    path = lowbit.save(model, tmp_path / "m.safetensors", dtype="float16")
    again = lowbit.load_into(CNN(), path)
    with torch.no_grad():
        assert (again(images()) - model(images())).norm() < 0.2 * model(images()).norm()
    assert not any(tensor.dtype == torch.float16 for tensor in again.state_dict().values())


def test_load_says_that_the_module_is_needed(tmp_path):
    path = lowbit.save(CNN(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"module of your own \(CNN\).*lowbit\.load_into\(module, "):
        lowbit.load(path)


def test_a_model_of_the_zoo_goes_into_its_module_too(tmp_path):
    model = lowbit.models.create("resnet8", 10)
    again = lowbit.load_into(lowbit.models.create("resnet8", 10), lowbit.save(model, tmp_path / "m.safetensors"))
    assert same(again, model.eval(), images())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, [type(m) for m in model.modules()]


class Renamed(CNN):
    def __init__(self):
        super().__init__()
        self.tail = self.head
        del self.head


class Strided(CNN):
    def __init__(self):
        super().__init__()
        self.body[1] = nn.Conv2d(8, 16, 3, stride=1)


class OtherForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Overridden(CNN):
    def __init__(self):
        super().__init__()
        self.head = OtherForward(16, 5)


OTHERS = {
    "other classes": (lambda: CNN(7), "'head"),
    "another name": (Renamed, "'head"),
    "another stride": (Strided, "'body.1'.*stride"),
    "another forward": (Overridden, "'head'.*OtherForward"),
    "another model": (Block, "'embed|'body"),
    "another dtype": (lambda: CNN().double(), "float64"),
    "quantized otherwise": (
        lambda: lowbit.quantize_(CNN(), lowbit.QuantConfig(DenseShift(bits=2))),
        "quantized already",
    ),
    "packed": (lambda: lowbit.pack(trained(CNN, images())), "packed already"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "run one batch"),
}


@pytest.mark.parametrize("form", ["float", "quantized", "packed"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_module_that_does_not_fit_is_refused_and_unchanged(other, form, tmp_path):
    make, message = OTHERS[other]
    if form != "packed" and other in ("another stride", "another forward"):
        return  # no tensor shows it
    model = CNN() if form == "float" else trained(CNN, images())
    model = lowbit.pack(model, images()) if form == "packed" else model
    path = lowbit.save(model, tmp_path / "m.safetensors")
    module = make()
    if other == "lazy":
        with pytest.raises(CheckpointError, match=message):
            lowbit.load_into(module, path)
        with pytest.raises(LowbitError, match=r"0\.weight.*run one batch"):
            lowbit.save(module, path)
        return
    before, kinds = state(module)
    with pytest.raises(CheckpointError, match=message):
        lowbit.load_into(module, path)
    after, kinds_after = state(module)
    assert kinds == kinds_after and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_error_names_all_layers(tmp_path):
    path = lowbit.save(lowbit.pack(trained(CNN, images()), images()), tmp_path / "m.safetensors")
    other = CNN(3)
    other.body[1] = nn.Conv2d(8, 4, 3, stride=2)
    with pytest.raises(CheckpointError, match=r"'body\.1'.*'head'"):
        lowbit.load_into(other, path)


def test_ties_are_kept_or_named(tmp_path):
    model = Block()
    path = lowbit.save(model, tmp_path / "m.safetensors")
    header, tensors = read(path)
    assert header["shared"] == {"head.weight": "embed.weight"} and "head.weight" not in tensors
    again = lowbit.load_into(Block(), path)
    assert again.head.weight is again.embed.weight
    apart = Block()
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"'head\.weight' and 'embed\.weight' are one tensor in the file, two"):
        lowbit.load_into(apart, path)
    with pytest.raises(CheckpointError, match=r"'head\.weight' and 'embed\.weight' are one tensor in the module, two"):
        with torch.no_grad():
            apart.head.weight.add_(1)
        lowbit.load_into(Block(), lowbit.save(apart, tmp_path / "apart.safetensors"))
    zoo = lowbit.models.create("vit_nano", 10)
    zoo.blocks[1].mlp.fc1.weight = zoo.blocks[0].mlp.fc1.weight
    again = lowbit.load(lowbit.save(zoo, tmp_path / "zoo.safetensors"))
    assert again.blocks[1].mlp.fc1.weight is again.blocks[0].mlp.fc1.weight
    x = torch.randn(2, 3, 32, 32)
    assert same(again, zoo.eval(), x)


class Odd(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(LowbitError, match=r"'0\._extra_state' is a dict.*get_extra_state return a tensor"):
        lowbit.save(nn.Sequential(Odd({})), path)
    with pytest.raises(LowbitError, match="'weight' has no values"):
        lowbit.save(nn.Linear(2, 2, device="meta"), path)
    model = nn.Linear(2, 2)
    model.register_buffer("pairs", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(LowbitError, match=r"'pairs' is torch\.complex64.*persistent=False"):
        lowbit.save(model, path)
    assert not path.exists()


def test_views_of_one_storage_and_empty_tensors_are_saved(tmp_path):
    def make():
        model = nn.Linear(2, 2)
        whole = torch.arange(6.0)
        for name, held in (
            ("low", whole[:4]),
            ("high", whole[2:]),
            ("none", torch.zeros(0)),
            ("yes", torch.ones(2) > 0),
        ):
            model.register_buffer(name, held)
        return model

    model = make()
    again = lowbit.load_into(make(), lowbit.save(model, tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_packed_part_of_a_module_is_saved_with_it(tmp_path):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.last = inner, nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.inner(x))

    model = Outer(lowbit.pack(trained(CNN, images()), images())).eval()
    again = lowbit.load_into(Outer(CNN()), lowbit.save(model, tmp_path / "m.safetensors"))
    assert same(again, model, images())
    assert isinstance(again.inner.stem[1], nn.Identity)


def test_a_module_may_call_something_else_spec(tmp_path):
    model = CNN()
    model.spec = "of my own"
    lowbit.load_into(CNN(), lowbit.save(model, tmp_path / "m.safetensors"))
    model.spec = {"mine": 1}
    with pytest.raises(LowbitError, match=r"model\.spec"):
        lowbit.save(model, tmp_path / "m.safetensors")


# ---- hostile files ----


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    model = lowbit.pack(trained(CNN, images()), images())
    return lowbit.save(model, tmp_path_factory.mktemp("files") / "m.safetensors")


def rewritten(path, header, tensors):
    header = {key: value for key, value in header.items() if key != "sha256"}
    try:
        header["sha256"] = checksum(tensors, header | {"format": header.get("format", FORMAT)})
    except (TypeError, AttributeError):
        header["sha256"] = ""
    save_file(tensors, path, metadata={"lowbit": json.dumps(header)})
    return path


def refused(path, module=None):
    module = CNN() if module is None else module
    before, kinds = state(module)
    with pytest.raises(CheckpointError):
        lowbit.load_into(module, path)
    after, kinds_after = state(module)
    assert kinds == kinds_after and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError):
        lowbit.load(path)


def at(tree, *keys):
    for key in keys:
        tree = tree[key]
    return tree


HEAD = ("packed", "layers", "head")
CHANGES = {
    "no such layer": lambda h, t: h["packed"]["layers"].update({"nowhere": h["packed"]["layers"]["head"]}),
    "a layer that is none": lambda h, t: h["packed"]["layers"].update({"stem": h["packed"]["layers"]["head"]}),
    "the model itself": lambda h, t: h["packed"]["layers"].update({"": h["packed"]["layers"]["head"]}),
    "another kind": lambda h, t: at(h, *HEAD).update(kind="conv2d"),
    "an unknown kind": lambda h, t: at(h, *HEAD).update(kind="os.system"),
    "further entries": lambda h, t: at(h, *HEAD).update(code="import os"),
    "bits": lambda h, t: at(h, *HEAD).update(bits=4),
    "a huge shape": lambda h, t: at(h, *HEAD).update(shape=[2**31 - 1, 2**31 - 1]),
    "a negative shape": lambda h, t: at(h, *HEAD).update(shape=[-5, 16]),
    "no levels": lambda h, t: at(h, *HEAD).update(levels=[]),
    "levels that fall": lambda h, t: at(h, *HEAD, "levels").reverse(),
    "fewer levels than codes": lambda h, t: at(h, "packed", "layers", "body.1", "levels").__delitem__(slice(2, None)),
    "a range": lambda h, t: at(h, *HEAD).update(low=5, high=-5),
    "a stride of a linear layer": lambda h, t: at(h, *HEAD).update(stride=[1, 1]),
    "a number for a list": lambda h, t: h["packed"].update(stored=3),
    "stored twice": lambda h, t: h["packed"]["stored"].append("head"),
    "stored, but no layer": lambda h, t: h["packed"]["stored"].append("stem"),
    "folded, but no norm": lambda h, t: h["packed"]["folded"].append("head"),
    "folded, but nowhere": lambda h, t: h["packed"]["folded"].append("a.b"),
    "missing data": lambda h, t: t.pop("head.data"),
    "data of another size": lambda h, t: t.update({"head.data": t["head.data"][:, :64].clone()}),
    "data of another type": lambda h, t: t.update({"head.data": t["head.data"].float()}),
    "scale of another size": lambda h, t: t.update({"head.scale": torch.ones(1)}),
    "sums of another type": lambda h, t: t.update({"head.sums": t["head.sums"].long()}),
    "bias of another size": lambda h, t: t.update({"head.bias": torch.ones(3)}),
    "input scale of another size": lambda h, t: t.update({"head.x_scale": torch.ones(3)}),
    "input scale of integers": lambda h, t: t.update({"head.x_scale": torch.ones(1, dtype=torch.int32)}),
    "a before of another size": lambda h, t: t.update({"head.before": torch.ones(3)}),
    "codes beyond the levels": lambda h, t: t.update({"body.0.levels": t["body.0.levels"][:1].clone()}),
    "codes of another type": lambda h, t: t.update({"body.0.codes": t["body.0.codes"].int()}),
    "codes of another size": lambda h, t: t.update({"body.0.codes": t["body.0.codes"][:4].clone()}),
    "row scale of another size": lambda h, t: t.update({"body.0.row_scale": torch.ones(5, 7)}),
    "a further tensor": lambda h, t: t.update({"more": torch.ones(1)}),
    "tied to itself": lambda h, t: h.update(shared={"seen": "seen"}),
    "tied to nothing": lambda h, t: h.update(shared={"other": "nothing"}),
    "an unknown method": lambda h, t: h["quantization"]["layers"].update({"head": {"weight": {"method": "os"}}}),
    "a quantized norm": lambda h, t: h["quantization"]["layers"].update({"stem.1": {"weight": {"method": "lsq"}}}),
    "an attention": lambda h, t: h["quantization"].update(attention={"head": {}}),
    "a dtype": lambda h, t: h.update(dtype="int8"),
    "a module that is no name": lambda h, t: h.update(module=["os", "system"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_with_a_right_checksum_is_refused(change, packed_file, tmp_path):
    header, tensors = read(packed_file)
    header, tensors = copy.deepcopy(header), dict(tensors)
    CHANGES[change](header, tensors)
    refused(rewritten(tmp_path / "m.safetensors", header, tensors))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory):
    model = lowbit.quantize_(lowbit.models.create("resnet8", 10, width=4), CONFIG)
    packed = lowbit.pack(lowbit.calibrate(model, images()))
    return lowbit.save(packed, tmp_path_factory.mktemp("files") / "m.safetensors")


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_the_header_loads_the_same_or_is_refused(data, packed_file, tmp_path):
    header, tensors = read(packed_file)
    header = copy.deepcopy(header)
    where = data.draw(st.sampled_from([path for path in places(header) if path and path[0] not in ("sha256", "card")]))
    at(header, *where[:-1])[where[-1]] = data.draw(JSON)
    path = rewritten(tmp_path / "m.safetensors", header, tensors)
    module = CNN()
    before, kinds = state(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            lowbit.load_into(module, path)
        except CheckpointError:
            after, kinds_after = state(module)
            assert kinds == kinds_after and all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert module(images()).isfinite().all()
        with pytest.raises(CheckpointError):
            lowbit.load(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_the_header_of_a_packed_zoo_model_too(data, zoo_file, tmp_path):
    header, tensors = read(zoo_file)
    header = copy.deepcopy(header)
    parts = [path for path in places(header) if path and path[0] in ("packed", "quantization", "shared", "dtype")]
    where = data.draw(st.sampled_from(parts))
    at(header, *where[:-1])[where[-1]] = data.draw(JSON)
    path = rewritten(tmp_path / "m.safetensors", header, tensors)
    try:
        model = lowbit.load(path)
    except CheckpointError:
        return
    assert model(images()).isfinite().all()


class Versioned(nn.Linear):
    """A layer that refuses the state of another version, as torchvision's MNASNet does."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 3:
            raise ValueError(f"version {local_metadata.get('version')} is not 3")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_modules_are_told_their_version(tmp_path):
    model = nn.Sequential(Versioned(4, 3))
    path = lowbit.save(model, tmp_path / "model.safetensors")
    assert torch.equal(lowbit.load_into(nn.Sequential(Versioned(4, 3)), path)[0].weight, model[0].weight)
