import pytest

for name in ("datatrove", "ftfy", "py3langid", "trafilatura", "pyarrow"):
    pytest.importorskip(name, reason=f"needs the extra data: {name}")
