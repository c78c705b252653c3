"""What stands behind a name in a config: keel's own policy loss or advantage estimator, or another package's.

Names are looked up when a config is read, so that one that nobody knows, or settings that a function does not
take, are an error before any model loads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from keel import plugins
from keel.errors import UsageError
from keel.plugins import GROUPS, Group


def built_in(group: Group) -> Mapping[str, Callable[..., Any] | None]:
    """keel's own, by name. The algorithms are imported here: reading a config of other stages loads no
    torch."""
    if group == "keel.engines":
        return {"keel": None, "reference": None}  # opened where the model is: keel.rl.setup
    if group == "keel.advantages":
        from keel.algorithms.advantages import ESTIMATORS

        return ESTIMATORS
    from keel.algorithms.policy import LOSSES

    return LOSSES


def is_plugin(group: Group, name: str) -> bool:
    """Whether a name is none of keel's own."""
    return name not in built_in(group)


def find(group: Group, name: str) -> Callable[..., Any] | None:
    """The function behind a name; None for an engine of keel's own.

    UsageError for a name that nobody has, with the nearest one that somebody has; for one that two packages
    have, or a package and keel; for a package that cannot be imported; for something that cannot be called.
    """
    ours, added = built_in(group), plugins.names(group)
    if name in ours:
        if name in added:
            raise UsageError(f"an installed package adds {GROUPS[group]} {name!r}, which is keel's own name")
        return ours[name]
    if name not in added:
        known = sorted({*ours, *added})
        near = get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"no installed package adds {GROUPS[group]} {name!r}; {hint}")
    function = plugins.load(group, name)
    if not callable(function):
        raise UsageError(f"{GROUPS[group]} {name!r} is {type(function).__name__}, which cannot be called")
    return function


def accepted(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """The keywords that a function names, and whether it takes any others."""
    parameters = inspect.signature(function).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for p in parameters if p.kind in by_name}
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function can be given this keyword."""
    names, any_other = accepted(function)
    return any_other or keyword in names


def keywords(
    what: str,
    function: Callable[..., Any],
    positional: tuple[str, ...],
    offered: Mapping[str, Any],
    given: Mapping[str, Any],
    needed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The keywords to call a function with: those `offered` that it takes, and all that the user has `given`.

    what: how messages name the function. positional: the arguments that come first. needed: keywords of
    `offered` that it must take. UsageError where the call could not succeed, and for a given keyword that the
    function does not take or that is not the user's to give.
    """
    names, any_other = accepted(function)
    for name in given:
        if name in positional or name in offered:
            raise UsageError(f"{what}: `{name}` is passed by keel; leave it out of the arguments")
        if not any_other and name not in names:
            near = get_close_matches(name, names - {*positional, *offered}, 1, 0.5)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UsageError(f"{what} takes no argument `{name}`{hint}")
    if missing := next((name for name in needed if not takes(function, name)), None):
        raise UsageError(
            f"{what} must take a keyword `{missing}`: its signature is {inspect.signature(function)}"
        )
    passed = {name: value for name, value in offered.items() if any_other or name in names}
    try:
        inspect.signature(function).bind(*positional, **passed, **given)
    except TypeError as error:
        expected = ", ".join([*positional, *(f"{name}=" for name in offered)])
        raise UsageError(
            f"{what} cannot be called as keel calls it, f({expected}): {error};"
            f" its signature is {inspect.signature(function)}"
        ) from None
    return {**passed, **given}


LOSS_ARGUMENTS = ("logp", "old_logp", "advantages", "mask")
LOSS_TENSORS = ("denominator", "ref_logp", "weights")  # what keel passes besides, where a loss takes it
ADVANTAGE_ARGUMENTS = ("rewards", "mask")


def policy_loss(name: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> partial[Any]:
    """A policy loss with its settings bound: called with `LOSS_ARGUMENTS` and those of `LOSS_TENSORS` that it
    takes. UsageError as `find` and `keywords`."""
    function = find("keel.policy_losses", name)
    assert function is not None
    offered = {**dict.fromkeys(LOSS_TENSORS), **settings}
    what = f"policy loss {name!r}"
    passed = keywords(what, function, LOSS_ARGUMENTS, offered, given, needed=("denominator",))
    return partial(function, **{key: value for key, value in passed.items() if key not in LOSS_TENSORS})


def estimator(name: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> partial[Any]:
    """An advantage estimator with its settings bound: called with `ADVANTAGE_ARGUMENTS`, and `values` where
    it takes them. UsageError as `find` and `keywords`."""
    function = find("keel.advantages", name)
    assert function is not None
    offered = {"values": None, **settings}
    passed = keywords(f"advantage estimator {name!r}", function, ADVANTAGE_ARGUMENTS, offered, given)
    return partial(function, **{key: value for key, value in passed.items() if key != "values"})


def engine(name: str, given: Mapping[str, Any]) -> partial[Any] | None:
    """What opens another package's engine on a model; None for keel's own. UsageError as `find` and
    `keywords`."""
    function = find("keel.engines", name)
    if function is None:
        if given:
            raise UsageError(f"`engine_args` has no effect with `engine: {name}`")
        return None
    return partial(function, **keywords(f"rollout engine {name!r}", function, ("model",), {}, given))
