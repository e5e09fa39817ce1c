"""Operators as pure tensor functions, each beside its reference. Import as ``diffaccel.kernels``."""

if __name__ == "kernels":
    # The checkout root is on sys.path and someone (transformers, diffusers) asked for Hugging Face's `kernels`
    # package, which this folder hides. Hand over to the real one; without it, stay an empty module, which both
    # read as "not installed".
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _spec = PathFinder.find_spec(__name__, [p for p in sys.path if os.path.abspath(p) != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = _module = module_from_spec(_spec)
        _spec.loader.exec_module(_module)
