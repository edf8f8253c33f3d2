"""Every form of a codec file is read to the same weights, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fishrt_export.checkpoint import CodecFiles, find_codec
from fishrt_export.codec.dac import Dac
from fishrt_export.codec.load import fingerprint, fuse_codec, read_codec_config, read_stored_codec
from fishrt_export.errors import ExportError
from fishrt_export.graphs import CodecSource, open_codec
from synthetic import millions


@pytest.fixture
def codec_folder(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "codec"
    shutil.copytree(golden / "codec/checkpoint", folder)
    return folder


def edit_codec(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "codec.pth"
    torch.save(edit(torch.load(path, weights_only=True)), path)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "codec_config.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def copied(source: CodecSource) -> dict[str, torch.Tensor]:
    """The weights as they are now: a source maps the file, which these tests write again."""
    return {name: tensor.clone() for name, tensor in source.weights.items()}


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: {"state_dict": w},
        lambda w: {**{f"generator.{name}": tensor for name, tensor in w.items()}, "discriminator.weight": torch.zeros(2)},
        lambda w: {"state_dict": {f"generator.{name}": tensor for name, tensor in w.items()}, "optimizer": {}},
        lambda w: {
            **w,
            "quantizer.pre_module.causal_mask": torch.ones(4, 4, dtype=torch.bool),
            "quantizer.post_module.freqs_cis": torch.zeros(4, 2, 2, dtype=torch.bfloat16),
            "discriminators.0.weight": torch.zeros(2),
            "quantizer.quantizer.quantizers.0.codebook.inited": torch.ones(1),
            "quantizer.semantic_predictor_module.norm.weight": torch.ones(1),
        },
    ],
    ids=["state_dict", "generator", "both", "stray"],
)
def test_codec_forms(codec_folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    before = open_codec(codec_folder)
    weights = copied(before)
    edit_codec(codec_folder, edit)
    after = open_codec(codec_folder)
    assert after.problems() == []
    assert after.fingerprint == before.fingerprint
    assert weights.keys() == after.weights.keys()
    assert all(torch.equal(weights[name], after.weights[name]) for name in weights)


def test_both_spellings_of_weight_norm(codec_folder: Path) -> None:
    """Every pair spelled the old way, then every pair the new way; the sum is checked by the definition."""
    weights = copied(open_codec(codec_folder))
    new = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
    old = (".weight_g", ".weight_v")
    for wanted, other in ((old, new), (new, old)):

        def spell(weights: dict[str, Any], wanted: Any = wanted, other: Any = other) -> dict[str, Any]:
            for source, target in zip(other, wanted, strict=True):
                weights = {
                    name.removesuffix(source) + target if name.endswith(source) else name: w for name, w in weights.items()
                }
            return weights

        edit_codec(codec_folder, spell)
        stored = read_stored_codec(find_codec(codec_folder))
        assert any(name.endswith(wanted) for name in stored)
        assert not any(name.endswith(other) for name in stored)
        after = open_codec(codec_folder)
        assert after.problems() == []
        assert all(torch.equal(weights[name], after.weights[name]) for name in weights)
        assert after.fingerprint == fingerprint(weights, after.config)
    stem = next(name.removesuffix(new[0]) for name in stored if name.endswith(new[0]))
    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(*stored[stem + new[1]].shape[1::-1], 1), dim=0)
    module.parametrizations.weight.original0.data, module.parametrizations.weight.original1.data = (
        stored[stem + end] for end in new
    )
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
        (lambda c: c.update(decoder_dim=7), "decoder_dim is 7"),
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


def test_fused_weights_take_the_place_of_the_pairs(codec_folder: Path) -> None:
    fused = fuse_codec(read_stored_codec(find_codec(codec_folder)))
    assert not any("parametrizations" in name or name.endswith(("_g", "_v")) for name in fused)


def test_the_official_sizes() -> None:
    """Millions of parameters that encoding and decoding need, as the publisher's tables add up."""
    config = read_codec_config(CodecFiles(Path("codec.pth"), None))
    with torch.device("meta"):
        dac = Dac(config)
    quantizer = dac.quantizer
    looked_up = [part for codebook in quantizer.codebooks for part in (codebook.codebook, codebook.out_proj)]
    assert millions(dac.encoder, quantizer.downsample, quantizer.pre_module, *quantizer.codebooks) == 207.22
    assert millions(dac.decoder, quantizer.upsample, quantizer.post_module, *looked_up) == 184.38
    assert (config.hop, len(config.codebook_sizes)) == (2048, 10)
