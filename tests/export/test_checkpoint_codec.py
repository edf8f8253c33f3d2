"""Every form of a codec file is read to the same weights, and faulty ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHOSEN, find_golden
from fishrt_export.checkpoint.files import CodecFiles, find_codec
from fishrt_export.errors import ExportError
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.firefly import Firefly
from fishrt_export.models.codec.load import fingerprint, read_codec_config, read_stored_codec
from fishrt_export.sources.codec import CodecSource, open_codec
from synthetic import millions

pytestmark = pytest.mark.slow


@pytest.fixture
def codec_folder(s2_golden: Path, tmp_path: Path) -> Path:
    """A DAC codec."""
    return Path(shutil.copytree(s2_golden / "codec/checkpoint", tmp_path / "codec"))


@pytest.fixture
def any_codec(golden: Path, tmp_path: Path) -> Path:
    """The codec of each family."""
    return Path(shutil.copytree(golden / "codec/checkpoint", tmp_path / "codec"))


@pytest.fixture(params=["fish-1.4", "fish-1.2"])
def firefly_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Firefly codec, causal and centred."""
    return Path(shutil.copytree(find_golden(CHOSEN, request.param) / "codec/checkpoint", tmp_path / "codec"))


def edit_codec(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = find_codec(folder).weights
    torch.save(edit(torch.load(path, weights_only=True)), path)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "codec_config.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def copied(source: CodecSource) -> dict[str, torch.Tensor]:
    """Return a copy of the weights: a source maps the file, which these tests overwrite."""
    return {name: tensor.clone() for name, tensor in source.weights.items()}


def with_strays(weights: dict[str, Any]) -> dict[str, Any]:
    """Add tensors that official files contain in addition to the codec."""
    of_template = {"head.noise_convs.0.weight": torch.ones(1)} if "backbone.norm.weight" in weights else {}
    return {
        **weights,
        **of_template,
        "quantizer.pre_module.causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "quantizer.post_module.freqs_cis": torch.zeros(4, 2, 2, dtype=torch.bfloat16),
        "discriminators.0.weight": torch.zeros(2),
        "quantizer.quantizer.quantizers.0.codebook.inited": torch.ones(1),
        "quantizer.semantic_predictor_module.norm.weight": torch.ones(1),
    }


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: {"state_dict": w},
        lambda w: {**{f"generator.{name}": tensor for name, tensor in w.items()}, "discriminator.weight": torch.zeros(2)},
        lambda w: {"state_dict": {f"generator.{name}": tensor for name, tensor in w.items()}, "optimizer": {}},
        with_strays,
        lambda w: {f"module.{name}": tensor for name, tensor in with_strays(w).items()},
        lambda w: {"state_dict": {f"model.codec._orig_mod.{name}": tensor for name, tensor in w.items()}},
        lambda w: {name: tensor.double() for name, tensor in w.items()},
    ],
    ids=["state_dict", "generator", "both", "stray", "prefix", "nested prefix", "float64"],
)
def test_codec_forms(any_codec: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    before = open_codec(any_codec)
    weights = copied(before)
    assert before.problems() == []
    edit_codec(any_codec, edit)
    after = open_codec(any_codec)
    assert after.problems() == []
    assert after.fingerprint == before.fingerprint
    assert weights.keys() == after.weights.keys()
    assert all(torch.equal(weights[name], after.weights[name]) for name in weights)


def test_both_spellings_of_weight_norm(any_codec: Path) -> None:
    """Every pair spelled the old way, then every pair the new way; the sum is checked by the definition."""
    weights = copied(open_codec(any_codec))
    new = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
    old = (".weight_g", ".weight_v")
    for wanted, other in ((old, new), (new, old)):

        def spell(weights: dict[str, Any], wanted: Any = wanted, other: Any = other) -> dict[str, Any]:
            for source, target in zip(other, wanted, strict=True):
                weights = {
                    name.removesuffix(source) + target if name.endswith(source) else name: w for name, w in weights.items()
                }
            return weights

        edit_codec(any_codec, spell)
        stored = read_stored_codec(find_codec(any_codec))
        assert any(name.endswith(wanted) for name in stored)
        assert not any(name.endswith(other) for name in stored)
        after = open_codec(any_codec)
        assert after.problems() == []
        assert all(torch.equal(weights[name], after.weights[name]) for name in weights)
        assert after.fingerprint == fingerprint(weights, after.config)
    for stem in (name.removesuffix(new[0]) for name in stored if name.endswith(new[0])):
        module = torch.nn.Conv1d(1, 1, 1)  # whichever kind it is, the magnitudes are those of the first axis
        module.weight.data = stored[stem + new[1]]
        torch.nn.utils.parametrizations.weight_norm(module, dim=0)
        module.parametrizations.weight.original0.data = stored[stem + new[0]]  # type: ignore[union-attr, operator]
        assert torch.allclose(module.weight, weights[f"{stem}.weight"], rtol=0, atol=1e-6)


def test_a_16_bit_codec_stays_16_bit(codec_folder: Path) -> None:
    edit_codec(codec_folder, lambda w: {name: tensor.half() for name, tensor in w.items()})
    source = open_codec(codec_folder)
    assert source.problems() == []
    assert {tensor.dtype for tensor in source.weights.values()} == {torch.float16}


def test_the_fingerprint_tells_codecs_apart(codec_folder: Path) -> None:
    source = open_codec(codec_folder)
    name = sorted(source.weights)[0]
    changed = {**source.weights, name: source.weights[name].clone()}
    changed[name].view(-1)[0] += 1e-3
    assert fingerprint(changed, source.config) != source.fingerprint
    assert fingerprint(dict(reversed(source.weights.items())), source.config) == source.fingerprint


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (lambda c: c.update(sample_rate=c["sample_rate"] + 1), False),
        (lambda c: c["quantizer"]["post_module"].update(window_size=3), False),
        (lambda c: c["quantizer"]["pre_module"]["config"].update(rope_base=77), False),
        (lambda c: c["quantizer"]["pre_module"]["config"].update(rope_base=10000.0), True),
        (lambda c: c["quantizer"].update(quantizer_dropout=0.1), True),
    ],
    ids=["sample rate", "window", "rope", "spelling", "training"],
)
def test_the_fingerprint_is_of_the_sound(codec_folder: Path, edit: Callable[[dict[str, Any]], object], same: bool) -> None:
    edit_config(codec_folder, lambda c: c["quantizer"]["pre_module"]["config"].update(rope_base=10000))
    before = open_codec(codec_folder).fingerprint
    edit_config(codec_folder, edit)
    assert (open_codec(codec_folder).fingerprint == before) == same


def test_a_codec_that_does_not_fit_its_config(codec_folder: Path) -> None:
    edit_codec(codec_folder, lambda w: {name: tensor for name, tensor in w.items() if name != "decoder.model.0.conv.bias"})
    edit_codec(codec_folder, lambda w: {**w, "encoder.stray.weight": torch.zeros(2)})
    problems = open_codec(codec_folder).problems()
    assert [problem.split(" [")[0] for problem in problems] == [
        "missing: decoder.model.0.conv.bias",
        "unexpected: encoder.stray.weight",
    ]
    (codec_folder / "codec_config.json").unlink()
    assert any(problem.startswith("wrong shape: encoder.block.0") for problem in open_codec(codec_folder).problems())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("sample_rate"), "lacks sample_rate"),
        (lambda c: c["quantizer"].pop("pre_module"), r"lacks quantizer\.pre_module"),
        (lambda c: c.update(decoder_rates=[2, 2]), r"decoder_rates is \[2, 2\]"),
        (lambda c: c.update(quantizer=3), "quantizer is 3; expected an object"),
        (lambda c: c.update(sample_rate=-1), "sample_rate is -1"),
        (lambda c: c.update(sample_rate="44100"), "sample_rate is '44100'"),
        (lambda c: c.update(encoder_rates=[2, 0, 8]), r"encoder_rates is \[2, 0, 8\]"),
        (lambda c: c.update(encoder_rates=[]), r"encoder_rates is \[\]"),
        (lambda c: c["encoder_transformer_layers"].append(0), "encoder_transformer_layers is .*; expected one number for each"),
        (lambda c: c.update(encoder_transformer_layers=[-1] * len(c["encoder_rates"])), "encoder_transformer_layers is"),
        (lambda c: c.update(decoder_dim=7), "decoder_dim is 7; expected .* halved"),
        (lambda c: c["quantizer"].update(codebook_size=True), r"quantizer\.codebook_size is True"),
        (lambda c: c["quantizer"].update(downsample_factor=2), r"quantizer\.downsample_factor is 2"),
        (lambda c: c["quantizer"].update(input_dim=7), r"quantizer\.input_dim is 7"),
        (lambda c: c["quantizer"]["pre_module"].update(window_size=0), r"quantizer\.pre_module\.window_size is 0"),
        (lambda c: c["quantizer"]["pre_module"].update(causal=False), r"quantizer\.pre_module\.causal is False"),
        (lambda c: c["quantizer"]["post_module"]["config"].update(head_dim=5), r"post_module\.config\.head_dim is 5"),
        (lambda c: c["quantizer"]["post_module"]["config"].update(norm_eps=0), r"post_module\.config\.norm_eps is 0"),
        (lambda c: c["quantizer"]["post_module"]["config"].update(n_local_heads=1), r"post_module\.config\.n_local_heads is 1"),
        (lambda c: c.update(encoder_kernel=5), "unknown fields: encoder_kernel"),
        (lambda c: c["transformer_general_config"].update(x=1), r"unknown fields: transformer_general_config\.x"),
        (lambda c: c["quantizer"]["post_module"].update(look=1), r"unknown fields: quantizer\.post_module\.look"),
    ],
)
def test_a_codec_config_that_cannot_be(codec_folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_config(codec_folder, edit)
    with pytest.raises(ExportError, match=f"codec_config.json.*{message}"):
        open_codec(codec_folder)


def test_a_codec_file_of_unnamed_tensors(codec_folder: Path) -> None:
    edit_codec(codec_folder, lambda w: dict(enumerate(w.values())))
    with pytest.raises(ExportError, match=r"codec\.pth holds an entry named 0"):
        open_codec(codec_folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense"])
def test_a_foreign_codec_file(codec_folder: Path, content: bytes) -> None:
    (codec_folder / "codec.pth").write_bytes(content)
    with pytest.raises(ExportError, match=r"codec\.pth cannot be read"):
        open_codec(codec_folder)


def test_a_truncated_codec(codec_folder: Path) -> None:
    path = codec_folder / "codec.pth"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"codec\.pth cannot be read"):
        open_codec(codec_folder)


def test_a_codec_file_without_a_codec(codec_folder: Path) -> None:
    edit_codec(codec_folder, lambda _: {"embeddings.weight": torch.zeros(2)})
    with pytest.raises(ExportError, match="holds no codec"):
        open_codec(codec_folder)


def test_a_codec_file_with_two_codecs(codec_folder: Path) -> None:
    edit_codec(codec_folder, lambda w: {**w, "backbone.norm.weight": torch.zeros(2)})
    with pytest.raises(ExportError, match="holds parts of two codecs"):
        open_codec(codec_folder)


def test_fused_weights_take_the_place_of_the_pairs(any_codec: Path) -> None:
    fused = open_codec(any_codec).weights
    assert not any("parametrizations" in name or name.endswith(("_g", "_v")) for name in fused)


def test_a_config_of_another_release_names_every_tensor(firefly_folder: Path) -> None:
    causal = open_codec(firefly_folder).kind == "firefly"
    other = find_golden(CHOSEN, "fish-1.2" if causal else "fish-1.4") / "codec/checkpoint/codec_config.json"
    shutil.copy(other, firefly_folder / "codec_config.json")
    problems = open_codec(firefly_folder).problems()
    groups = [p for p in problems if "quantizer.residual_fsq.rvqs." in p]
    stages = [p for p in problems if "quantizer.downsample.1." in p]
    # Of four groups three tensors have another width; four groups of four tensors are too many or too few.
    assert len(groups) == 4 * 3 + 4 * 4
    assert {p.split(":")[0] for p in groups} == {"wrong shape", "unexpected" if causal else "missing"}
    assert len(stages) == 2 + 9  # a convolution, and a block of nine tensors


def test_a_config_of_the_other_kind(firefly_folder: Path, s2_golden: Path) -> None:
    shutil.copy(s2_golden / "codec/checkpoint/codec_config.json", firefly_folder)
    with pytest.raises(ExportError, match="unknown fields: decoder_dim"):
        open_codec(firefly_folder)


def test_a_codec_that_lacks_the_convolutions_of_its_kind(firefly_folder: Path) -> None:
    """Centred names are bare, causal ones wrapped: a file with some of each is neither."""
    wrapped = open_codec(firefly_folder).kind == "firefly"
    name = "head.conv_post.conv.bias" if wrapped else "head.conv_post.bias"
    other = "head.conv_post.bias" if wrapped else "head.conv_post.conv.bias"
    edit_codec(firefly_folder, lambda w: {other if key == name else key: tensor for key, tensor in w.items()})
    problems = [problem.split(" [")[0] for problem in open_codec(firefly_folder).problems()]
    assert problems == [f"missing: {name}", f"unexpected: {other}"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("head"), "lacks head"),
        (lambda c: c["spec_transform"].update(n_fft=2047), r"spec_transform\.win_length is 2048; expected 2047"),
        (lambda c: c["spec_transform"].update(win_length=1024), r"spec_transform\.win_length is 1024; expected 2048"),
        (lambda c: c["spec_transform"].update(n_fft=511, win_length=511), r"n_fft is 511; expected at least hop_length, 512"),
        (lambda c: c["spec_transform"].update(hop_length=256), r"spec_transform\.hop_length is 256; expected 512"),
        (lambda c: c["head"].update(hop_length=256), r"head\.hop_length is 256; expected 512"),
        (lambda c: c["backbone"].update(input_channels=7), r"backbone\.input_channels is 7; expected \d+, to fit"),
        (lambda c: c["backbone"]["dims"].append(9), r"quantizer\.input_dim is \d+; expected 9, to fit"),
        (lambda c: c["backbone"]["depths"].append(9), r"backbone\.depths is .*; expected one number for each of the 4 dims"),
        (lambda c: c["head"].update(num_mels=4), r"head\.num_mels is 4; expected \d+, to fit"),
        (lambda c: c["head"].update(use_template=True), r"head\.use_template is True; expected false"),
        (lambda c: c["head"].update(upsample_initial_channel=3), r"head\.upsample_initial_channel is 3; expected .* halved"),
        (lambda c: c["head"]["upsample_kernel_sizes"].pop(), r"head\.upsample_kernel_sizes is .*; expected one for each"),
        (
            lambda c: c["head"]["upsample_kernel_sizes"].__setitem__(0, 6),
            r"head\.upsample_kernel_sizes is \[6, .*at least as large",
        ),
        (
            lambda c: c["head"]["resblock_dilation_sizes"].pop(),
            r"head\.resblock_dilation_sizes is .*; expected one list for each",
        ),
        (
            lambda c: c["head"]["resblock_dilation_sizes"].__setitem__(1, [1, 0]),
            r"head\.resblock_dilation_sizes\[1\] is \[1, 0\]",
        ),
        (lambda c: c["quantizer"].update(n_groups=7919), r"quantizer\.n_groups is 7919; expected a divisor of input_dim"),
        (lambda c: c["quantizer"].update(levels=[8, 1]), r"quantizer\.levels is \[8, 1\]; expected .* at least 2"),
        (lambda c: c["quantizer"].update(levels=8), r"quantizer\.levels is 8"),
        (lambda c: c["head"].update(activation="silu"), r"unknown fields: head\.activation"),
        (lambda c: c.update(discriminator={}), "unknown fields: discriminator"),
    ],
)
def test_a_firefly_config_that_cannot_be(firefly_folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_config(firefly_folder, edit)
    with pytest.raises(ExportError, match=f"codec_config.json.*{message}"):
        open_codec(firefly_folder)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("backbone", "kernel_size", 6),
        ("head", "pre_conv_kernel_size", 12),
        ("head", "post_conv_kernel_size", 12),
        ("head", "resblock_kernel_sizes", [3, 7, 10]),
        ("head", "upsample_kernel_sizes", [16, 15, 4, 4, 4]),
    ],
)
def test_even_kernels_have_no_centre(firefly_folder: Path, part: str, name: str, value: Any) -> None:
    centred = open_codec(firefly_folder).kind == "centred firefly"
    edit_config(firefly_folder, lambda c: c[part].update({name: value}))
    if not centred:
        assert open_codec(firefly_folder).problems()  # a wrong shape, but no contradiction
        return
    with pytest.raises(ExportError, match=rf"{part}\.{name} is .*; expected"):
        open_codec(firefly_folder)


def test_the_fingerprint_of_firefly_is_of_the_sound(firefly_folder: Path) -> None:
    before = open_codec(firefly_folder).fingerprint
    edit_config(firefly_folder, lambda c: c["backbone"].update(drop_path_rate=0.0))
    assert open_codec(firefly_folder).fingerprint == before
    edit_config(firefly_folder, lambda c: c["head"]["resblock_dilation_sizes"].__setitem__(0, [1, 3, 7]))
    assert open_codec(firefly_folder).fingerprint != before


def test_a_buffer_of_an_older_file_changes_nothing() -> None:
    """Files of one family hold six buffers that are computed here."""
    folder = find_golden(CHOSEN, "s1-mini") / "codec/checkpoint"
    names = torch.load(folder / "codec.pth", weights_only=True).keys()
    buffers = {name for name in names if name.endswith((".causal_mask", ".freqs_cis"))}
    assert len(buffers) == 6
    assert read_stored_codec(find_codec(folder)).keys() == names - buffers
    assert open_codec(folder).problems() == []


def test_the_official_sizes() -> None:
    """Millions of parameters that encoding and decoding need, as the publisher's tables add up."""
    config = read_codec_config(CodecFiles(Path("codec.pth"), None), {"encoder.x": torch.empty(0)})
    with torch.device("meta"):
        dac = Dac(config)
    quantizer = dac.quantizer
    looked_up = [part for codebook in quantizer.codebooks for part in (codebook.codebook, codebook.out_proj)]
    assert millions(dac.encoder, quantizer.downsample, quantizer.pre_module, *quantizer.codebooks) == 207.22
    assert millions(dac.decoder, quantizer.upsample, quantizer.post_module, *looked_up) == 184.38
    assert (config.hop, len(config.codebook_sizes)) == (2048, 10)


@pytest.mark.parametrize(
    ("stem", "keys", "encoding", "decoding", "hop", "codebooks", "least"),
    [
        ("head.conv_pre.conv", 547, 24.71, 22.34, 2048, 8, 769),
        ("head.conv_pre", 509, 22.08, 19.71, 1024, 4, 1024),
    ],
    ids=["causal", "centred"],
)
def test_the_official_sizes_of_firefly(
    stem: str, keys: int, encoding: float, decoding: float, hop: int, codebooks: int, least: int
) -> None:
    config = read_codec_config(CodecFiles(Path("codec.pth"), None), {f"{stem}.bias": torch.empty(0)})
    with torch.device("meta"):
        firefly = Firefly(config)
    quantizer = firefly.quantizer
    groups = quantizer.residual_fsq.rvqs
    assert millions(firefly.backbone, quantizer.downsample, *(group.project_in for group in groups)) == encoding
    assert millions(firefly.head, quantizer.upsample, *(group.project_out for group in groups)) == decoding
    normed = [name for name in firefly.state_dict() if name.startswith("head.") and name.endswith(".weight")]
    assert len(firefly.state_dict()) + len(normed) == keys
    assert (config.hop, config.codebook_sizes, config.min_samples) == (hop, (1000,) * codebooks, least)
