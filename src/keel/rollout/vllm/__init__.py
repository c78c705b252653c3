"""A vLLM server as rollout engine: asked over HTTP, given the weights whenever they have changed.

wire.py      JSON over HTTP, many requests at a time
asking.py    what a request says, and a completion from an answer
weights.py   what a server is given: adapters, or all weights
server.py    the environment that vLLM is installed in, and a server that keel starts
served.py    what a server says of itself
guard.py     ends that server with the process that started it
holding.py   a server that holds the trainer's weights
engine.py    the engine
shared.py    one server that samples for several ranks
"""

from keel.rollout.vllm.engine import VllmEngine
from keel.rollout.vllm.holding import ServerSettings
from keel.rollout.vllm.shared import SharedEngine

__all__ = ["ServerSettings", "SharedEngine", "VllmEngine"]
