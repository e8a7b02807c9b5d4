"""Models of transformers (random weights from a configuration): quantized, trained, packed, saved, with adapters."""

import copy

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn import first_and_last, huggingface, quantized_layers
from lowbit.nn.products import attach_products_, low_bit_products, projections_of
from lowbit.quantizers import LSQ, DenseShift, StatsQ

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 5}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
TEXT = {"vocab_size": 100}
# name: class of the model, of its configuration, its settings
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 5}),
    "bert": ("BertForSequenceClassification", "BertConfig", {**SMALL, **TEXT}),
    "bert, masked words": ("BertForMaskedLM", "BertConfig", {**SMALL, **TEXT}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, **TEXT}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", {**DISTIL, **TEXT}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, **TEXT, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **TEXT}),
}
OF_IMAGES = ("vit", "deit", "swin")
WITH_QKR = ("vit", "deit", "swin", "bert", "bert, masked words", "roberta")
CONFIG = {"weight": StatsQ(bits=3), "activation": LSQ(bits=8, granularity="token"), "first_last": 8, "attention": True}


def make(name, **more):
    """A model with random weights and biases; GPT-2's with linear layers."""
    torch.manual_seed(0)
    cls, config, settings = MODELS[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**settings, **more})).eval()
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):  # they are zero at the start, and QKR drops some
            nn.init.normal_(parameter, std=0.1)
    return huggingface.conv1d_to_linear_(model)


def batch(name):
    generator = torch.Generator().manual_seed(1)
    if name in OF_IMAGES:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    words = torch.randint(2, 100, (2, 9), generator=generator)
    return {"input_ids": words, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}


def seen(name, logits):
    """Without the results at places that the mask hides, which nothing defines."""
    return logits if logits.ndim == 2 else logits[batch(name)["attention_mask"].bool()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_without_quantizers_is_theirs(name, implementation):
    model = make(name, attn_implementation=implementation)
    expected = model(**batch(name)).logits
    ours = copy.deepcopy(model)
    for part, module in list(ours.named_modules()):
        if huggingface.is_attention(module):
            attach_products_(module, projections_of(part, module))
    assert len(low_bit_products(ours)) == (4 if name == "swin" else 2)
    torch.testing.assert_close(seen(name, ours(**batch(name)).logits), seen(name, expected), rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_later_words_are_hidden_also_without_a_mask(name):
    """Without one, sdpa is told to hide them itself, and so must we."""
    model, words = make(name, attn_implementation="sdpa"), batch(name)["input_ids"]
    expected = model(words).logits
    for part, module in list(model.named_modules()):
        if huggingface.is_attention(module):
            attach_products_(module, projections_of(part, module))
    torch.testing.assert_close(model(words).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_QKR)
def test_reparameterization_alone_drops_the_biases_of_queries_and_keys(name):
    model = make(name)
    ours = copy.deepcopy(model)
    lowbit.quantize_(ours, lowbit.QuantConfig(qkr=True))
    for module in model.modules():
        if huggingface.is_attention(module):
            for layer in huggingface.projections_of("", module).names[:2]:
                nn.init.zeros_(getattr(module, layer).bias)
    torch.testing.assert_close(ours(**batch(name)).logits, model(**batch(name)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "qkr"), [(name, qkr) for name in MODELS for qkr in (False, True)[: 1 + (name in WITH_QKR)]]
)
def test_a_model_is_quantized_trained_packed_and_restored(name, qkr, tmp_path):
    model, x = make(name), batch(name)
    lowbit.quantize_(model, lowbit.QuantConfig(**CONFIG, qkr=qkr), huggingface.family_filter(model))
    lowbit.calibrate(model, x)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen(name, model.train()(**x).logits).square().mean().backward()
    optimizer.step()
    latents = [part for part in before if ".original" in part]
    assert latents and all(not torch.equal(before[part], model.state_dict()[part]) for part in latents)
    model.eval()
    expected = seen(name, model(**x).logits)
    packed = lowbit.pack(model, x)
    torch.testing.assert_close(seen(name, packed(**x).logits), expected, rtol=1e-3, atol=1e-4)
    assert all(found.weight is None for found in quantized_layers(packed))
    for each in (model, packed):
        path = lowbit.save(each, tmp_path / "model.safetensors")
        restored = lowbit.load_into(make(name), path)
        assert torch.equal(restored(**x).logits, each(**x).logits)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_QKR])
def test_reparameterization_of_other_attention_is_refused_by_name(name):
    with pytest.raises(LowbitError, match=r"qkr=True is not possible for '.*(attn|attention)'.*Attention"):
        lowbit.quantize_(make(name), lowbit.QuantConfig(StatsQ(), qkr=True))


def test_tokens_generated_one_by_one_are_those_of_the_whole_text():
    """Cached keys and values are those before their quantizers."""
    model = make("gpt2")
    config = lowbit.QuantConfig(StatsQ(bits=4), LSQ(bits=8), attention=True)
    words = batch("gpt2")["input_ids"]
    lowbit.calibrate(lowbit.quantize_(model, config), words)
    cached = model.generate(words, max_new_tokens=5, do_sample=False, pad_token_id=0)
    whole = model.generate(words, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert cached.shape == (2, 14) and torch.equal(cached, whole)


def test_layers_of_gpt2_are_refused_by_name_until_they_are_linear():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **TEXT)).eval()
    with pytest.raises(LowbitError, match=r"'transformer.h.0.attn.c_attn' is a Conv1D .*conv1d_to_linear_"):
        lowbit.quantize_(model, lowbit.QuantConfig(StatsQ()))
    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(print)
    with pytest.raises(LowbitError, match=r"would lose: 'transformer.h.1.mlp.c_fc'; remove"):
        huggingface.conv1d_to_linear_(model)
    handle.remove()
    x = batch("gpt2")
    expected = model(**x).logits
    torch.testing.assert_close(huggingface.conv1d_to_linear_(model)(**x).logits, expected)


def test_tied_embeddings_stay_tied_or_are_refused():
    model = make("bert, masked words")
    config = lowbit.QuantConfig(StatsQ(), LSQ(bits=8), first_last="same")
    lowbit.quantize_(model, config)
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert decoder.parametrizations.weight.original is embedding.weight
    with pytest.raises(LowbitError, match=r"'cls.predictions.decoder' is also .*word_embeddings.weight"):
        lowbit.quantize_(make("bert, masked words"), lowbit.QuantConfig(DenseShift(), first_last="same"))


@pytest.mark.parametrize("name", MODELS)
def test_ends_are_the_image_s_patches_and_the_head(name):
    ends = first_and_last(make(name))
    heads = {"bert, masked words": "decoder", "llama": "lm_head", "gpt2": "lm_head", "roberta": "out_proj"}
    assert any(end.endswith(heads.get(name, "classifier")) for end in ends)
    assert any(end.endswith("projection") for end in ends) == (name in OF_IMAGES)


@pytest.mark.parametrize("family", huggingface.FULL_PRECISION)
def test_each_pattern_of_the_filter_table_is_the_name_of_a_layer(family):
    import fnmatch

    names = [
        layer for each in MODELS for layer, _ in make(each).named_modules() if make(each).config.model_type == family
    ]
    further = {
        "roberta": ("RobertaForMaskedLM", "RobertaModel"),
        "distilbert": ("DistilBertForMaskedLM",),
        "vit": ("ViTModel",),
        "deit": ("DeiTModel",),
    }
    for cls in further.get(family, ()):
        names += [layer for layer, _ in getattr(transformers, cls)(make(family).config).named_modules()]
    assert all(fnmatch.filter(names, pattern) for pattern in huggingface.FULL_PRECISION[family])


def test_a_family_without_a_filter_is_named():
    with pytest.raises(LowbitError, match=r"no filter for Sequential \(model_type None\).*bert"):
        huggingface.family_filter(nn.Sequential())


def test_arguments_that_change_attention_are_refused():
    config = transformers.Gemma2Config(**SMALL, **TEXT, num_key_value_heads=2, head_dim=8)
    model = transformers.Gemma2ForCausalLM(config)
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(), LSQ(bits=8), attention=True))
    with pytest.raises(LowbitError, match="argument softcap of Gemma2Attention"):
        model(torch.zeros(1, 3, dtype=torch.long))


def test_lowbit_s_training_takes_a_classifier_of_images():
    from lowbit.data import load
    from lowbit.training import TrainConfig

    data = load("digits").subset(train=640, test=200)
    size = {"image_size": data.input_shape[-1], "num_channels": data.input_shape[0], "patch_size": 4, "num_labels": 10}
    model = huggingface.Logits(make("vit", **size))
    lowbit.quantize_(model, lowbit.QuantConfig(**CONFIG, qkr=True))
    record = lowbit.train(model, data, TrainConfig(epochs=6, batch_size=64, lr=3e-3))
    assert record.history[-1]["train_loss"] < 0.8 * record.history[0]["train_loss"]


@pytest.mark.parametrize("first", ["quantized", "adapted"])
def test_adapters_of_lora_stay_beside_quantized_layers(first):
    peft = pytest.importorskip("peft")
    model, x = make("bert"), batch("bert")
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    config = lowbit.QuantConfig(StatsQ(bits=4), LSQ(bits=8), attention=True)
    if first == "quantized":
        model = peft.get_peft_model(lowbit.quantize_(model, config, huggingface.family_filter(model)), lora)
    else:
        model = peft.get_peft_model(model, lora)
        lowbit.quantize_(model, config, huggingface.family_filter(model))
    lowbit.calibrate(model.eval(), x)
    names = [found.name for found in quantized_layers(model)]
    assert len(names) == 12 and not any("lora" in name for name in names)
    model(**x).logits.square().sum().backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    assert len(adapters) == 8 and all(parameter.grad.abs().sum() > 0 for parameter in adapters)
    packed = lowbit.pack(model, x)
    torch.testing.assert_close(packed(**x).logits, model(**x).logits, rtol=1e-3, atol=1e-4)
    with packed.disable_adapter():
        assert not torch.allclose(packed(**x).logits, model(**x).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("attention", [False, True])
def test_a_vision_model_becomes_a_plan_that_c_runs(name, attention):
    model, x = make(name), batch(name)["pixel_values"]
    config = lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last=8, attention=attention)
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    packed = lowbit.pack(huggingface.Logits(model), x)
    plan = lowbit.plan(packed, x)
    for images in (x[:1], torch.cat([x, x.flip(0)])):
        torch.testing.assert_close(plan(images), packed(images), rtol=1e-3, atol=1e-3)


def test_swin_s_masks_keep_it_from_becoming_a_graph():
    """They are made for the number of items at hand; timm's Swin becomes a plan."""
    model, x = make("swin"), batch("swin")["pixel_values"]
    lowbit.calibrate(lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last=8)), x)
    packed = lowbit.pack(huggingface.Logits(model), x)
    with pytest.raises(LowbitError, match="Logits cannot be fused"):
        lowbit.plan(packed, x)
