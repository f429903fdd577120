"""manifest.json: reads back what it wrote, and refuses everything else by field name."""

import json

import pytest
from msgspec.structs import replace

from scalebits_compiler.artifact.sizes import summarize
from scalebits_compiler.codegen.plan import make_plan
from scalebits_compiler.errors import ArtifactError
from scalebits_compiler.runtime import manifest as m
from scalebits_compiler.runtime.schema import parse_json


@pytest.fixture
def manifest(build_module, module_shape):
    module = build_module(module_shape(layers=1, bias=True))
    weights = {}
    for weight in module.weights.values():
        packed = weight.type.dtype == "packed"
        kind, dtype = ("packed", "packed") if packed else ("dense", "F32")
        weights[weight.symbol] = m.WeightRecord(
            kind, dtype, weight.type.static_shape(), weight.block, weight.group
        )
    summary = {**summarize(module), "code_bits": 3.0, "effective_bits": 3.25}
    return m.Manifest(
        target={"kind": "plugin"},  # whose kernel table may be anything
        files={"model.safetensors": m.FileRecord("0" * 64, 12)},
        weights=weights,
        plan=make_plan(module),
        kernels=m.Kernels("kernels/cpu.so", {"version": 1, "sizes": {1: 2}}),
        summary=summary,
        provenance=m.Provenance("a,b", 0, "0.1.0", "tiny", {}, {"group": 32}),
    )


def edited(manifest, *path, value=None, remove=False):
    """The text with one place changed and the digest made right again."""
    body = json.loads(manifest.to_json())
    place = body
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    body["digest"] = m._digest({key: item for key, item in body.items() if key != "digest"})
    return json.dumps(body)


def test_round_trip(manifest):
    text = manifest.to_json()
    again = m.Manifest.from_json(text)
    assert again.to_json() == text
    assert again.plan == manifest.plan
    assert again.weights == manifest.weights
    assert again.file_bytes == 12 + len(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 1, r"version: 1 is unknown"),
        (["version"], 5, r"version: 5 is unknown, this program reads 6"),  # run was a name
        (["format"], "gguf", "format"),
        (["version"], 6.0, r"version: 6\.0 is unknown"),
        (["extra"], 1, "json: Object contains unknown field 'extra'"),
        (["target", "kind"], "", "target.kind"),
        (["files", "../x"], {"sha256": "0" * 64, "bytes": 1}, "no file name"),
        (["files", "/x"], {"sha256": "0" * 64, "bytes": 1}, "no file name"),
        (
            ["files", "model.safetensors", "bytes"],
            "1",
            r"files\.model\.safetensors\.bytes: Expected 'int', got 'str'",
        ),
        (["files", "model.safetensors", "bytes"], True, "bytes: Expected 'int', got 'bool'"),
        (["files", "model.safetensors", "sha256"], "abc", "sha256: Expected 'str' matching"),
        (["weights", "embed", "kind"], "packed", r"weights\.embed\.kind"),
        (["weights", "embed", "kind"], "loose", r"weights\.embed\.kind: Invalid enum value"),
        (["weights", "embed", "shape"], [1.5], r"weights\.embed\.shape\[0\]: Expected 'int'"),
        (
            ["weights", "layers.0.q", "group"],
            2**31,
            r"weights\.layers\.0\.q\.group: Expected 'int'",
        ),
        (["weights", "embed", "colour"], 1, r"weights\.embed: .*unknown field 'colour'"),
        (["plan", "steps", 0, "op"], "conv", r"step 0 \(conv\): this op is unknown"),
        (["plan", "steps", 0, "inputs"], ["nothing"], "nothing is not defined"),
        (["plan", "steps", 0, "weights"], ["nothing"], "nothing is not defined"),
        (["plan", "steps", 2, "weights"], ["layers.0.q"], "must be dense"),
        (["plan", "steps", 0, "inputs"], [], "wrong number of inputs"),
        (["plan", "steps", 0, "attrs"], {"x": 1}, "attributes"),
        (["plan", "steps", 2, "attrs", "eps"], "x", r"plan\.steps\[2\]\.attrs\.eps: .*got 'str'"),
        (["plan", "steps", 2, "attrs", "eps"], True, r"plan\.steps\[2\]\.attrs\.eps: .*got 'bool'"),
        (["plan", "output"], "nothing", "output"),
        (["kernels", "library"], None, "library: Expected 'str', got 'null'"),
        (["summary", "code_bits"], "3", "code_bits"),
        (["summary", "matrices", "layers.0.q", "shape"], 1, r"matrices\.layers\.0\.q\.shape"),
        (["summary", "matrices", "other"], {}, r"summary: matrices\.other"),
        (["provenance", "seed"], None, "seed"),
        (["provenance", "source_sha256"], {"a": 1}, r"source_sha256\.a: Expected 'str'"),
    ],
)
def test_strict(manifest, path, value, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        m.Manifest.from_json(edited(manifest, *path, value=value), "OUT/manifest.json")
    assert "OUT/manifest.json" in str(caught.value)


@pytest.mark.parametrize("field", ["plan", "kernels", "summary", "files", "weights"])
def test_missing_field(manifest, field):
    with pytest.raises(ArtifactError, match=f"missing required field '{field}'"):
        m.Manifest.from_json(edited(manifest, field, remove=True))


def test_any_edit_breaks_the_digest(manifest):
    text = manifest.to_json().replace('"code_bits": 3.0', '"code_bits": 2.0')
    with pytest.raises(ArtifactError, match="digest"):
        m.Manifest.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100000])
def test_not_json(text):
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        m.Manifest.from_json(text)


def test_optional_parts(manifest):
    bare = replace(manifest, plan=None, kernels=None)
    assert m.Manifest.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[NaN]", "NaN"),
        ("[1e999]", "too large"),
        (r'{"\ud800": 1}', "surrogates"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_values_that_json_does_not_have(text, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_json(text, "file.json")
    assert str(caught.value).startswith("file.json: not JSON: ")


def test_a_matrix_that_the_summary_does_not_have(manifest):
    with pytest.raises(ArtifactError, match=r"summary\.matrices: these are not the packed"):
        m.Manifest.from_json(edited(manifest, "summary", "matrices", "layers.0.q", remove=True))
