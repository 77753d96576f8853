"""Nested dictionaries, and fields by their paths: "a.b" is `tree["a"]["b"]`."""


def merged(below, above):
    """`below` with what is in `above` on top."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: merged(below.get(name), value) for name, value in above.items()}


def nested(fields):
    """The tree with these values by path."""
    tree = {}
    for path, value in fields.items():
        node = tree
        *parents, name = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def leaves(tree, prefix=""):
    """(path, value) of everything in a tree that is no dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
