"""Every form of a codec file is read to the same weights, and faulty ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fishrt_export.checkpoint.forms.folder import Checkpoint, CodecFiles
from fishrt_export.errors import ExportError
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.firefly import Firefly
from fishrt_export.models.codec.load import fingerprint, read_codec_config, read_stored_codec
from fishrt_export.sources.codec import CodecSource, open_codec
from synthetic import millions
from vectors import CHOSEN, find_golden

pytestmark = pytest.mark.slow
CopyCodec = Callable[[str], Path]
ABSENT = object()
UNKNOWN = "has unknown fields: "


@pytest.fixture
def copied_codec(tmp_path: Path) -> CopyCodec:
    """Copies the codec of a family, to be written to."""
    return lambda folder: Path(shutil.copytree(find_golden(CHOSEN, folder) / "codec/checkpoint", tmp_path / "codec"))


@pytest.fixture
def codec_folder(copied_codec: CopyCodec) -> Path:
    """A DAC codec."""
    return copied_codec("s2-pro")


@pytest.fixture
def any_codec(golden: Path, copied_codec: CopyCodec) -> Path:
    """The codec of each family."""
    return copied_codec(golden.name)


@pytest.fixture(params=["fish-1.4", "fish-1.2"])
def firefly_folder(request: pytest.FixtureRequest, copied_codec: CopyCodec) -> Path:
    """A Firefly codec, causal and centred."""
    return copied_codec(request.param)


def edit_codec(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = Checkpoint.of(folder).codec_files().weights
    torch.save(edit(torch.load(path, weights_only=True)), path)


def edit_config(folder: Path, path: str, value: Any) -> None:
    """Set the field at a path, or remove it; an object is merged."""
    file = folder / "codec_config.json"
    data = part = json.loads(file.read_text())
    *parents, name = path.split(".")
    for key in parents:
        part = part[key]
    if isinstance(part, list):
        part[int(name)] = value
    elif value is ABSENT:
        del part[name]
    else:
        part[name] = {**part[name], **value} if isinstance(value, dict) and name in part else value
    file.write_text(json.dumps(data))


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
        stored = read_stored_codec(Checkpoint.of(any_codec).codec_files())
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
    ("folder", "path", "value", "same"),
    [
        ("s2-pro", "sample_rate", 8001, False),
        ("s2-pro", "quantizer.post_module.window_size", 3, False),
        ("s2-pro", "quantizer.pre_module.config.rope_base", 77, False),
        ("s2-pro", "quantizer.pre_module.config.rope_base", 10000.0, True),
        ("s2-pro", "quantizer.quantizer_dropout", 0.1, True),
        ("fish-1.4", "backbone.drop_path_rate", 0.0, True),
        ("fish-1.4", "head.resblock_dilation_sizes.0", [1, 3, 7], False),
        ("fish-1.2", "head.resblock_dilation_sizes.0", [1, 3, 7], False),
    ],
)
def test_the_fingerprint_is_of_the_sound(copied_codec: CopyCodec, folder: str, path: str, value: Any, same: bool) -> None:
    codec = copied_codec(folder)
    if folder == "s2-pro":
        edit_config(codec, "quantizer.pre_module.config.rope_base", 10000)
    before = open_codec(codec).fingerprint
    edit_config(codec, path, value)
    assert (open_codec(codec).fingerprint == before) == same


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


DAC_FAULTS = [
    ("sample_rate", ABSENT, "lacks sample_rate"),
    ("quantizer.pre_module", ABSENT, "lacks quantizer.pre_module"),
    ("decoder_rates", [2, 2], "expected numbers with the product of encoder_rates"),
    ("quantizer", 3, "expected an object"),
    ("sample_rate", -1, "expected a positive whole number"),
    ("sample_rate", "44100", "expected a positive whole number"),
    ("encoder_rates", [2, 0, 8], "expected a list of whole numbers of at least 1"),
    ("encoder_rates", [], "expected a list of whole numbers of at least 1"),
    ("encoder_transformer_layers", [0], "expected one number for each"),
    ("encoder_transformer_layers", [-1] * 4, "expected a list of whole numbers of at least 0"),
    ("decoder_dim", 7, "expected enough channels that one is left after they are halved"),
    ("quantizer.codebook_size", True, "expected a positive whole number"),
    ("quantizer.downsample_factor", 2, "expected a list"),
    ("quantizer.input_dim", 7, "expected the encoder's width"),
    ("quantizer.pre_module.window_size", 0, "expected a positive whole number"),
    ("quantizer.pre_module.causal", False, "expected true"),
    ("quantizer.post_module.config.head_dim", 5, "expected an even number"),
    ("quantizer.post_module.config.norm_eps", 0, "expected a positive number"),
    ("quantizer.post_module.config.n_local_heads", 1, "expected -1"),
    ("encoder_kernel", 5, UNKNOWN),
    ("transformer_general_config.x", 1, UNKNOWN),
    ("quantizer.post_module.look", 1, UNKNOWN),
]
FIREFLY_FAULTS = [
    ("head", ABSENT, "lacks head"),
    ("spec_transform.n_fft", 2047, "spec_transform.win_length is 2048; expected 2047"),
    ("spec_transform.win_length", 1024, "expected 2048"),
    ("spec_transform", {"n_fft": 511, "win_length": 511}, "spec_transform.n_fft is 511; expected at least hop_length, 512"),
    ("spec_transform.hop_length", 256, "expected 512"),
    ("head.hop_length", 256, "expected 512"),
    ("backbone.input_channels", 7, "to fit the other fields"),
    ("backbone.dims", [8, 12, 16, 9], "expected 9, to fit the other fields"),
    ("backbone.depths", [1], "expected one number for each of the 4 dims"),
    ("head.num_mels", 4, "to fit the other fields"),
    ("head.use_template", True, "expected false"),
    ("head.upsample_initial_channel", 3, "expected enough channels that one is left after they are halved"),
    ("head.upsample_kernel_sizes", [16, 16, 4, 4], "expected one for each"),
    ("head.upsample_kernel_sizes", [6, 16, 4, 4, 4], "at least as large"),
    ("head.resblock_dilation_sizes", [[1, 3, 5]] * 2, "expected one list for each"),
    ("head.resblock_dilation_sizes.1", [1, 0], "head.resblock_dilation_sizes[1] is [1, 0]"),
    ("quantizer.n_groups", 7919, "expected a divisor of input_dim"),
    ("quantizer.levels", [8, 1], "expected a list of whole numbers of at least 2"),
    ("quantizer.levels", 8, "expected a list of whole numbers of at least 2"),
    ("head.activation", "silu", UNKNOWN),
    ("discriminator", {}, UNKNOWN),
]


@pytest.mark.parametrize(
    ("folder", "path", "value", "message"),
    [
        *(("s2-pro", *fault) for fault in DAC_FAULTS),
        *((folder, *fault) for folder in ("fish-1.4", "fish-1.2") for fault in FIREFLY_FAULTS),
    ],
)
def test_a_codec_config_that_cannot_be(copied_codec: CopyCodec, folder: str, path: str, value: Any, message: str) -> None:
    codec = copied_codec(folder)
    edit_config(codec, path, value)
    with pytest.raises(ExportError, match=r"^codec_config\.json") as caught:
        open_codec(codec)
    assert message in str(caught.value)
    if message == UNKNOWN:
        assert str(caught.value).endswith(f" {path}")
    elif message.startswith("expected") and "fit" not in message:
        assert f"{path} is {value!r}; " in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: dict(enumerate(w.values())), r"codec\.pth holds an entry named 0"),
        (lambda _: b"PK\x03\x04nonsense", r"codec\.pth cannot be read"),
        (lambda _: {"embeddings.weight": torch.zeros(2)}, "holds no codec"),
        (lambda w: {**w, "backbone.norm.weight": torch.zeros(2)}, "holds parts of two codecs"),
    ],
    ids=["unnamed", "foreign", "no codec", "two codecs"],
)
def test_a_codec_file_of_something_else(codec_folder: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Other files of weights that cannot be read are those of the language model; see test_damaged_checkpoints.py."""
    path = codec_folder / "codec.pth"
    content = edit(torch.load(path, weights_only=True))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ExportError, match=message):
        open_codec(codec_folder)


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
    ("path", "value"),
    [
        ("backbone.kernel_size", 6),
        ("head.pre_conv_kernel_size", 12),
        ("head.post_conv_kernel_size", 12),
        ("head.resblock_kernel_sizes", [3, 7, 10]),
        ("head.upsample_kernel_sizes", [16, 15, 4, 4, 4]),
    ],
)
def test_even_kernels_have_no_centre(firefly_folder: Path, path: str, value: Any) -> None:
    centred = open_codec(firefly_folder).kind == "centred firefly"
    edit_config(firefly_folder, path, value)
    if not centred:
        assert open_codec(firefly_folder).problems()  # a wrong shape, but no contradiction
        return
    with pytest.raises(ExportError, match=rf"{path} is .*; expected"):
        open_codec(firefly_folder)


def test_a_buffer_of_an_older_file_changes_nothing() -> None:
    """Files of one family hold six buffers that are computed here."""
    folder = find_golden(CHOSEN, "s1-mini") / "codec/checkpoint"
    names = torch.load(folder / "codec.pth", weights_only=True).keys()
    buffers = {name for name in names if name.endswith((".causal_mask", ".freqs_cis"))}
    assert len(buffers) == 6
    assert read_stored_codec(Checkpoint.of(folder).codec_files()).keys() == names - buffers
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
