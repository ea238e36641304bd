"""`pgrpo plugins`."""

import json

from pgrpo.cli.arguments import AsJson


def plugins(as_json: AsJson = False) -> None:
    """List the installed rewards, clusterers and data sets."""
    from pgrpo.plugins.registry import load_registry

    listing = load_registry().listing()
    if as_json:
        shown = ("kind", "name", "distribution", "doc", "settings")
        print(json.dumps([{key: getattr(one, key) for key in shown} for one in listing], indent=2))
        return
    for plugin in listing:
        print(f"{plugin.kind} {plugin.name} ({plugin.distribution}): {plugin.doc}")
        for name, text in plugin.settings.items():
            print(f"    {name}: {text}")
