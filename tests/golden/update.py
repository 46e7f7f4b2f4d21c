"""Writes the golden text of every registered experiment: `python -m tests.golden.update`."""

from pathlib import Path

from v3jax import config, registry

FOLDER = Path(__file__).parent


def update() -> list[str]:
    """Rewrites the folder to the experiments as they are; returns the names of changed files."""
    texts = {f"{name}.txt": config.to_text(registry.get(name)) for name in registry.names()}
    old = {path.name: path.read_text() for path in FOLDER.glob("*.txt")}
    for name in old.keys() - texts.keys():
        (FOLDER / name).unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
    return sorted(name for name in old | texts if old.get(name) != texts.get(name))


if __name__ == "__main__":
    print("\n".join(update()) or "nothing changed")
