"""A build runs under stock mlx-lm from the package index, in an environment without this project.

The environment is made once (about 200 MB, seconds with a warm cache). Besides the demo's build, a
second checkpoint serves the tool test: its weights are drawn so that each token determines the
next, hence the server must emit a given tool call.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from glm_quant.data import tiny_glm_path
from glm_quant.model import glm_moe_dsa as runtime

pytestmark = pytest.mark.slow

TINY = tiny_glm_path()
TOOL_CALL = (
    "</think><tool_call>find<arg_key>name</arg_key><arg_value>Stoat</arg_value></tool_call>"
    "<|observation|>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says TOOL_CALL after `<think>`, through all layers of the runtime."""
    folder = tmp_path_factory.mktemp("chain")
    for file in TINY.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, folder)
    shutil.copy(runtime.__file__, folder)
    config = json.loads((TINY / "config.json").read_text()) | {"model_file": "glm_moe_dsa.py"}
    (folder / "config.json").write_text(json.dumps(config))
    ids = load_tokenizer(TINY).encode("<think>" + TOOL_CALL, add_special_tokens=False)
    assert len(set(ids)) == len(ids), "a token with two successors cannot be chained"
    mx.random.seed(0)
    weights = dict(tree_flatten(runtime.Model(runtime.ModelArgs.from_dict(config)).parameters()))
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(value)  # every layer passes its input on
    table = mx.random.normal((config["vocab_size"], config["hidden_size"]))
    head = mx.zeros_like(table)
    for token, successor in pairwise(ids):
        head[successor] = table[token]
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": head}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def run(stock: Path, *command: str, cwd: Path, typed: str = "") -> str:
    """Run a program of the environment away from this project; returns its standard output."""
    done = subprocess.run(
        [str(stock / command[0]), *command[1:]],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "HF_HUB_OFFLINE": "1"},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def long_prompt() -> str:
    """Text of about 400 tokens, six times index_topk, with a fact at its beginning."""
    return "The lucky number of Mole is 4071. " + "Return the list of names in a module. " * 30


def test_environment_is_clean(stock: Path, tmp_path: Path) -> None:
    """What follows cannot lean on this project, on torch or on transformers' model code."""
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('glm_quant', 'torch')])"
    assert run(stock, "python", "-c", code, cwd=tmp_path).strip() == "[None, None]"


def test_needs_trust(stock: Path, build: Path, tmp_path: Path) -> None:
    """Without --trust-remote-code mlx-lm says what to do instead of loading its own port."""
    code = f"from mlx_lm import load; load({str(build)!r})"
    with pytest.raises(AssertionError, match="trust_remote_code=True"):
        run(stock, "python", "-c", code, cwd=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prefill-step-size", "50"],
        ["--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"],
    ],
    ids=["plain", "small steps", "8-bit cache"],
)
def test_generates_past_index_topk(
    stock: Path, build: Path, tmp_path: Path, options: list[str]
) -> None:
    """`mlx_lm.generate` on a prompt longer than index_topk."""
    command = ["mlx_lm.generate", "--model", str(build), "--trust-remote-code"]
    text = run(stock, *command, "--prompt", long_prompt(), "-m", "12", *options, cwd=tmp_path)
    assert "Generation:" in text


def test_prompt_cache_file_is_reused(stock: Path, build: Path, tmp_path: Path) -> None:
    """`mlx_lm.cache_prompt` saves; `generate` loads it before it imports the runtime."""
    model = ["--model", str(build), "--trust-remote-code"]
    file = ["--prompt-cache-file", "cache.safetensors"]
    run(stock, "mlx_lm.cache_prompt", *model, "--prompt", long_prompt(), *file, cwd=tmp_path)
    command = ["mlx_lm.generate", "--trust-remote-code", *file, "--prompt", "What?", "-m", "5"]
    assert "Generation:" in run(stock, *command, cwd=tmp_path)


def test_benchmark_and_chat(stock: Path, build: Path, tmp_path: Path) -> None:
    """`mlx_lm.benchmark` past index_topk, and one turn of `mlx_lm.chat`."""
    model = ["--model", str(build), "--trust-remote-code"]
    sizes = ["-p", "100", "-g", "4", "-n", "1"]
    assert "generation_tps=" in run(stock, "mlx_lm.benchmark", *model, *sizes, cwd=tmp_path)
    options = [*model, "--max-tokens", "4"]
    assert "bye" in run(stock, "mlx_lm.chat", *options, cwd=tmp_path, typed="Hello\nq\n")


def test_lora_trains_and_the_adapter_loads(stock: Path, build: Path, tmp_path: Path) -> None:
    """`mlx_lm.lora` on the quantized build, then generation with its adapter."""
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        line = json.dumps({"text": long_prompt()[:500]}) + "\n"
        (tmp_path / "data" / f"{name}.jsonl").write_text(line * 4)
    model = ["--model", str(build), "--trust-remote-code", "--adapter-path", "adapter"]
    options = ["--train", "--data", "data", "--iters", "2", "--batch-size", "2"]
    few = ["--num-layers", "2", "--val-batches", "1"]
    run(stock, "mlx_lm.lora", *model, *options, *few, cwd=tmp_path)
    prompt = ["--prompt", "Hello", "-m", "4"]
    assert "Generation:" in run(stock, "mlx_lm.generate", *model, *prompt, cwd=tmp_path)


EVALUATE = """
import json, sys
import lm_eval, mlx_lm.evaluate

task = json.loads(sys.argv.pop(1))
simple_evaluate = lm_eval.simple_evaluate
# The command line knows tasks by name only, and those fetch their data from the Hub.
lm_eval.simple_evaluate = lambda **given: simple_evaluate(**given | {"tasks": [task]})
sys.argv[0] = "mlx_lm.evaluate"
mlx_lm.evaluate.main()
"""


def test_evaluate_prefers_text_to_noise(stock: Path, build: Path, tmp_path: Path) -> None:
    """`mlx_lm.evaluate` scores choices of a local task; a trained model tells code from noise."""
    rows = [
        {"ctx": f"def {name}(self, {name}):\n    return", "choices": ["self", "zq"], "label": 0}
        for name in ("value", "name", "path", "size")
    ]
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    model = ["--model", str(build), "--trust-remote-code", "--tasks", "choices"]
    printed = run(stock, "python", "-c", EVALUATE, json.dumps(task), *model, cwd=tmp_path)
    assert '"acc,none": 1.0' in printed


def test_perplexity_is_that_of_a_trained_model(stock: Path, build: Path, tmp_path: Path) -> None:
    """mlx_lm.perplexity's measure on the held-out text that ships, far below uniform (1,280)."""
    code = (
        "import mlx.core as mx; from mlx_lm import load; from mlx_lm.perplexity import eval_ppl;"
        f"model, tok = load({str(build)!r}, trust_remote_code=True);"
        f"ids = tok.encode(open({str(TINY.parent / 'held_out.txt')!r}).read()[:4000])[:512];"
        "print('ppl', eval_ppl(model, mx.array(ids).reshape(-1, 256), batch_size=2)[0])"
    )
    text = run(stock, "python", "-c", code, cwd=tmp_path)
    assert 1 < float(text.rsplit("ppl", 1)[1]) < 400


@pytest.fixture(scope="session")
def serve(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that starts `mlx_lm.server` on a checkpoint and returns its address."""
    started: dict[Path, tuple[subprocess.Popen[bytes], str]] = {}
    log = tmp_path_factory.mktemp("server") / "log.txt"

    def start(model: Path) -> str:
        if model not in started:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [stock / "mlx_lm.server", "--model", model, "--trust-remote-code"]
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [*(str(part) for part in command), "--port", str(port)],
                    cwd=log.parent,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            started[model] = process, f"http://127.0.0.1:{port}"
            wait_for(process, f"http://127.0.0.1:{port}/health", log)
        return started[model][1]

    yield start
    for process, _ in started.values():
        process.terminate()
        process.wait(30)


def wait_for(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until a server answers."""
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(log.read_text()[-2000:])


CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", timeout=120)
def ask(text, **more):
    return client.chat.completions.create(
        model="default_model", messages=[{"role": "user", "content": text}], max_tokens=24,
        temperature=0, **more)
"""


def client(stock: Path, url: str, code: str, cwd: Path) -> Any:
    """Run a script with the OpenAI client; returns what it printed as JSON."""
    return json.loads(run(stock, "python", "-c", CLIENT + code, url, cwd=cwd))


def test_server_answers_batches_and_streams(
    stock: Path, build: Path, serve: Any, tmp_path: Path
) -> None:
    """Four prompts of uneven length at once get what each gets alone, and as a stream."""
    code = f"""
texts = ["Name a list.", {long_prompt()!r}, "What is a module?", {long_prompt()!r} + "Why?"]
say = lambda r: (r.choices[0].message.content or "") + (
    getattr(r.choices[0].message, "reasoning", None) or "")
alone = [say(ask(t)) for t in texts]
with ThreadPoolExecutor(4) as pool:
    together = [say(r) for r in pool.map(ask, texts)]
parts = []
for chunk in ask(texts[0], stream=True):
    if chunk.choices:
        delta = chunk.choices[0].delta
        parts.append((delta.content or "") + (getattr(delta, "reasoning", None) or ""))
print(json.dumps({{"alone": alone, "together": together, "stream": "".join(parts)}}))
"""
    found = client(stock, serve(build), code, tmp_path)
    assert all(found["alone"])
    assert found["together"] == found["alone"]
    assert found["stream"] == found["alone"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_server_calls_a_tool(
    stock: Path, chain: Path, serve: Any, tmp_path: Path, stream: bool
) -> None:
    """The model emits GLM's `<tool_call>`; the client gets a call with parsed arguments."""
    code = f"""
answer = ask("Find Stoat.", tools=[{TOOL!r}], stream={stream})
if {stream}:
    calls = [c for part in answer if part.choices for c in part.choices[0].delta.tool_calls or []]
else:
    calls = answer.choices[0].message.tool_calls
print(json.dumps([[c.function.name, json.loads(c.function.arguments)] for c in calls]))
"""
    assert client(stock, serve(chain), code, tmp_path) == [["find", {"name": "Stoat"}]]
