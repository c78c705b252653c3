"""A server that speaks vLLM's routes (0.32) and samples from a real tiny model by transformers, for tests of
what keel does with one: it counts what it is given, and can be told to fail.

Routes and the form of answers are those of vLLM's own code: `entrypoints/scale_out/token_in_token_out`,
`entrypoints/rl/online`, `entrypoints/serve/{dev,lora}`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GENERATE = "/inference/v1/generate"
Script = Callable[[str, Any, int], "tuple[int, Any] | str | None"]


class ScriptedVllm:
    """A server on this machine.

    script: (route, body, which of the calls of this route) → None: as vLLM would; (status, answer): this;
    "die": the server is gone, without a word. change: is given each answer of the route of tokens, and
    returns what is said instead.
    """

    def __init__(
        self,
        model: Path,
        *,
        key: str | None = None,
        mode: str = "processed_logprobs",
        lora: bool = False,
        port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.place, self.key, self.mode, self.lora = model, key, mode, lora
        self.script: Script = lambda route, body, number: None
        self.change: Callable[[Any], Any] = lambda answer: answer
        self.calls: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.host, self.port, self._lock = host, port, threading.RLock()
        self.start()

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Begin, or begin again with the weights of the start."""
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.place).eval()
        self.room = self.model.config.max_position_embeddings
        self.version, self.adapters = "default", dict[str, Any]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self, None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server._serve(self, json.loads(raw) if raw else None)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((self.host, self.port), Handler)
        self.port = self._server.server_address[1]
        self._server.daemon_threads, self._server.block_on_close = True, False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """The server is gone, and its port with it."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    def count(self, route: str) -> int:
        """Calls of a route so far."""
        return sum(called == route for called, _ in self.calls)

    # ------------------------------------------------------------ answers

    def _serve(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        route = handler.path.partition("?")[0]
        with self._lock:
            number = self.count(route)
            self.calls.append((route, body))
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
        said = self.script(route, body, number)
        if said == "die":
            self.kill()  # before the caller can notice and begin another one
            handler.close_connection = True
            return
        if said is None:
            guarded = route.startswith(("/v1", "/inference"))
            if self.key and guarded and handler.headers.get("Authorization") != f"Bearer {self.key}":
                said = 401, {"error": "Unauthorized"}
            else:
                said = self._answer(route, body)
        status, answer = said
        raw = b"" if answer is None else json.dumps(answer).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(raw)))
            handler.end_headers()
            handler.wfile.write(raw)
        except OSError:  # nobody listens any more
            handler.close_connection = True

    def _answer(self, route: str, body: Any) -> tuple[int, Any]:
        match route:
            case "/health":
                return 200, None
            case "/version":
                return 200, {"version": "0.32.0"}
            case "/v1/models":
                base = {"id": str(self.place), "parent": None, "max_model_len": self.room}
                return 200, {"data": [base, *({"id": name, "parent": base["id"]} for name in self.adapters)]}
            case "/server_info":
                lora = {"max_lora_rank": 16} if self.lora else None
                whole = {"model_config": {"logprobs_mode": self.mode}, "lora_config": lora}
                return 200, {"vllm_config": whole}
            case "/weight_info":
                return 200, {"weight_version": self.version}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True, "new_version": self.version}
            case "/reset_prefix_cache":
                return 200, {"success": True}
            case "/collective_rpc":
                return self._reload(Path(body["kwargs"]["weights_path"]))
            case "/v1/load_lora_adapter":
                return self._load(body["lora_name"], Path(body["lora_path"]))
            case "/v1/unload_lora_adapter":
                known = self.adapters.pop(body["lora_name"], None)
                return (200, None) if known else (404, {"error": {"message": "cannot be found"}})
            case "/sleep" | "/wake_up":
                return 200, {"status": route[1:]}
            case "/inference/v1/generate":
                return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _reload(self, place: Path) -> tuple[int, Any]:
        if not place.is_dir():
            return 500, {"error": {"message": f"no weights in {place}"}}
        found = {
            name: value for file in place.glob("*.safetensors") for name, value in load_file(file).items()
        }
        with self._lock:
            missing, unexpected = self.model.load_state_dict(found, strict=False)
            self.model.tie_weights()
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        return 200, {"results": [None]}

    def _load(self, name: str, place: Path) -> tuple[int, Any]:
        from peft import PeftModel

        if not self.lora:
            return 404, {"detail": "Not Found"}
        base = AutoModelForCausalLM.from_pretrained(self.place)
        self.adapters[name] = PeftModel.from_pretrained(base, place).eval()
        return 200, None

    def _generate(self, body: Any) -> tuple[int, Any]:
        name, params, prompt = body["model"], body["sampling_params"], body["token_ids"]
        if name != str(self.place) and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        model = self.adapters.get(name, self.model)
        with self._lock:
            version = self.version
            choice = _sampled(model, prompt, params) | {
                "weight_versions": None, "index": 0
            }  # fmt: skip
            choice["weight_versions"] = [{"version": version, "start": 0, "end": len(choice["token_ids"])}]
            logps = _prompt_logps(model, prompt) if params.get("prompt_logprobs") is not None else None
        answer = {"request_id": "1", "model": name, "choices": [choice], "prompt_logprobs": logps}
        return 200, self.change(answer)


def _sampled(model: Any, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
    """As vLLM samples, with a generator of the request's own."""
    generator = torch.Generator().manual_seed(params.get("seed") or 0)
    ids, logps, stop = list[int](), list[float](), None
    bias = {int(token): value for token, value in params.get("logit_bias", {}).items()}
    while len(ids) < params["max_tokens"] and stop is None:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
        for token, value in bias.items():
            logits[token] += value
        if params["temperature"] == 0:
            logp = logits.log_softmax(-1)
            token = int(logits.argmax())
        else:
            logp = (logits / params["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
        ids.append(token)
        logps.append(float(logp[token]))
        stop = token if token in params.get("stop_token_ids", ()) else None
    content = [{"token_id": i, "logprob": x, "rank": 1, "top_logprobs": []} for i, x in zip(ids, logps)]
    finish = "length" if stop is None else "stop"
    return {
        "token_ids": ids, "logprobs": {"content": content}, "finish_reason": finish, "stop_reason": stop,
    }  # fmt: skip


def _prompt_logps(model: Any, prompt: list[int]) -> list[Any]:
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    told = [{str(token): {"logprob": float(logp[i, token])}} for i, token in enumerate(prompt[1:])]
    return [None, *told]


def serve(folder: Path, words: list[str]) -> None:
    """What a `vllm` program does: serve a model at a port. Its process ids go to FOLDER/pids; where
    FOLDER/deadly holds a number, it takes it away and is gone at that call of the route of tokens."""
    with open(folder / "pids", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    host, port = words[words.index("--host") + 1], int(words[words.index("--port") + 1])
    one = ScriptedVllm(Path(words[1]), key=os.environ.get("VLLM_API_KEY"), port=port, host=host)
    (folder / "variables").write_text(json.dumps(dict(os.environ)), encoding="utf-8")
    deadly = folder / "deadly"

    def script(route: str, body: Any, number: int) -> Any:
        if route == GENERATE and deadly.exists() and number == int(deadly.read_text()):
            deadly.unlink()
            os._exit(1)
        return None

    one.script = script
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
