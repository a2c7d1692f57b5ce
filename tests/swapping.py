"Replace a function in every module that has imported it."
import importlib
import pkgutil
import sys

import gac


def swap(monkeypatch, module:str, name:str, value) -> None: # monkeypatch; where it is defined; its name
    "Set `name` to `value` in its own module and in all that imported it by name."
    # none may import it while it is replaced
    for found in pkgutil.walk_packages(gac.__path__, 'gac.'): importlib.import_module(found.name)
    old = getattr(sys.modules[module], name)
    for where in [m for n, m in sys.modules.items() if n.startswith('gac.') and getattr(m, name, None) is old]:
        monkeypatch.setattr(where, name, value)
