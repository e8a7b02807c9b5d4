"""The registry finds every method's file, and a new file is all that a new method needs."""

import subprocess
import sys
import textwrap

import pytest

import lowbit.functional
from lowbit import quantizers
from lowbit.errors import LowbitError
from lowbit.quantizers.base import method


def test_names_and_get_agree():
    shelf = {
        "lsq",
        "statsq",
        "pot",
        "denseshift",
        "s3",
        "deepshift_q",
        "deepshift_ps",
        "inq",
        "apot",
        "ternary",
        "binary",
    }
    assert shelf | {"dorefa", "pact"} <= set(quantizers.names())
    for name in quantizers.names():
        cls = quantizers.get(name)
        assert cls.name == name and cls() == cls()
        assert getattr(quantizers, cls.__name__) is cls
        assert cls.quantizes("weight") or cls.quantizes("activation")
    assert set(quantizers.names("weight")) | set(quantizers.names("activation")) == set(quantizers.names())


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(LowbitError, match=r"'lqs'.*lsq"):
        quantizers.get("lqs")


@pytest.mark.parametrize("call", [quantizers.names, quantizers.LSQ.quantizes, quantizers.StatsQ().quantizes])
def test_an_unknown_kind_is_refused(call):
    with pytest.raises(LowbitError, match=r"kind='weights'.*'weight' and 'activation'"):
        call("weights")


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(LowbitError, match="two"):
        method("lsq")(type("Other", (quantizers.Method,), {"__module__": "other"}))


def test_every_public_function_is_offered_and_documented():
    assert {"denseshift", "s3", "statsq", "lsq", "pot", "oscillation_step"} <= set(lowbit.functional.names())
    for name in lowbit.functional.names():
        assert getattr(lowbit.functional, name).__doc__


def test_a_new_file_is_all_that_a_new_method_needs(tmp_path):
    """A method dropped into a folder on the package's path shows up by name, class and function."""
    (tmp_path / "identityq.py").write_text(
        textwrap.dedent('''
            """Does nothing."""
            from lowbit.quantizers.base import Method, WeightQuantizer, method
            __all__ = ["IdentityQ", "identityq"]
            def identityq(w):
                """w"""
                return w
            class _Weight(WeightQuantizer):
                def forward(self, w):
                    return identityq(w)
            @method("identityq")
            class IdentityQ(Method):
                """Does nothing."""
                def weight(self, weight):
                    return _Weight()
        ''')
    )
    script = f"""
import importlib.util, sys
spec = importlib.util.find_spec("lowbit.quantizers")
spec.submodule_search_locations.append({str(tmp_path)!r})
module = importlib.util.module_from_spec(spec); sys.modules["lowbit.quantizers"] = module
spec.loader.exec_module(module)
import lowbit.functional
assert "identityq" in module.names("weight") and module.IdentityQ is module.get("identityq")
assert lowbit.functional.identityq(3) == 3
"""
    subprocess.run([sys.executable, "-c", script], check=True)
