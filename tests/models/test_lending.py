"""Lending a global: the thread that borrows gets ours, and every other thread what the module has."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from disco_trl.models.lending import StandIn, lend


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_only_the_thread_that_borrows_gets_it():
    module = {"shard": lambda model: f"whole {model}"}
    original = module["shard"]
    original.state = "theirs"
    ours = lambda model: f"parted {model}"  # noqa: E731
    ours.state = "ours"
    with lend(module, "shard", ours):
        assert (module["shard"]("lm"), module["shard"].state) == ("parted lm", "ours")
        assert in_another_thread(lambda: module["shard"]("lm")) == "whole lm"
        assert in_another_thread(lambda: module["shard"].state) == "theirs"
    assert module["shard"] is original


def test_two_threads_borrow_at_once():
    module = {"load": lambda: "theirs"}
    original = module["load"]
    first_has_it, second_is_done = threading.Event(), threading.Event()

    def first():
        with lend(module, "load", lambda: "first"):
            first_has_it.set()
            assert second_is_done.wait(timeout=60)
            return module["load"]()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert first_has_it.wait(timeout=60)
        with lend(module, "load", lambda: "second"):
            assert module["load"]() == "second"
        assert module["load"]() == "theirs"  # the first still borrows
        assert isinstance(module["load"], StandIn)
        second_is_done.set()
        assert running.result() == "first"
    assert module["load"] is original


def test_within_one_another_the_inner_one_holds():
    module = {"load": lambda: "theirs"}
    with lend(module, "load", lambda: "outer"):
        with lend(module, "load", lambda: "inner"):
            assert module["load"]() == "inner"
        assert module["load"]() == "outer"
    assert module["load"]() == "theirs"


def test_after_an_error_the_original_is_back():
    module = {"load": print}
    with pytest.raises(RuntimeError, match="on the way"), lend(module, "load", None):
        raise RuntimeError("on the way")
    assert module["load"] is print


def test_what_another_library_has_put_there_meanwhile_stays():
    module = {"Trainer": SimpleNamespace(name="theirs")}
    with lend(module, "Trainer", SimpleNamespace(name="ours")):
        module["Trainer"] = patched = SimpleNamespace(name="patched")
    assert module["Trainer"] is patched


def test_what_is_not_there_cannot_be_lent():
    with pytest.raises(KeyError), lend({}, "Trainer", None):
        pass
