"""Python runs this at its start, where `lota run` put its folder first: it waits for the import of deepspeed or
accelerate, and changes nothing else. A sitecustomize of the user's own runs afterwards."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_WAITS_FOR = {"deepspeed": "arm", "accelerate.state": "arm_accelerate"}


class _Waiting:
    """A finder that leaves finding to the others, and has `lota.wrap.hook` look at two modules once they are there."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in _WAITS_FOR:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                getattr(_hook(), _WAITS_FOR[name])(module)

            spec.loader.exec_module = exec_module
        return spec


def _hook():  # type: ignore[no-untyped-def]
    """`lota.wrap.hook`; of the launcher's own lota where the command's Python has none."""
    import importlib
    import importlib.util

    if "lota" not in sys.modules and importlib.util.find_spec("lota") is None:
        package = os.path.dirname(os.path.dirname(_HERE))
        spec = importlib.util.spec_from_file_location("lota", os.path.join(package, "__init__.py"))
        assert spec is not None and spec.loader is not None
        module = sys.modules["lota"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module("lota.wrap.hook")


def _tell_phase():  # type: ignore[no-untyped-def]
    """LOTA_PHASE on other hosts, where only the launcher's own variable arrives."""
    if "LOTA_PHASE" not in os.environ:
        import base64
        import json

        os.environ["LOTA_PHASE"] = json.loads(base64.urlsafe_b64decode(os.environ["PYTHON_LOTA_RUN"]))["phase"]


def _run_theirs():  # type: ignore[no-untyped-def]
    """The sitecustomize that Python would have run without ours."""
    import importlib.machinery
    import importlib.util

    path = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if "PYTHON_LOTA_RUN" in os.environ:
    _tell_phase()
    sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]
_run_theirs()
