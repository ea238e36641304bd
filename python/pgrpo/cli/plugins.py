"""`pgrpo plugins`."""


def plugins() -> None:
    """List the installed rewards and clusterers."""
    from pgrpo.plugins.registry import load_registry

    for plugin in load_registry().listing():
        print(f"{plugin.kind} {plugin.name} ({plugin.distribution}): {plugin.doc}")
        for name, text in plugin.settings.items():
            print(f"    {name}: {text}")
