"""No installed package has overwritten another's file. Neither pip nor uv notices: cuda-python 12 over cuda-bindings 13
passed all their checks, and broke the import of megatron.core."""

import os.path
from collections import defaultdict
from importlib import metadata

# Strays at the top of site-packages that nothing imports.
HARMLESS = {"build_backend.py", "tests/__init__.py"}


def test_a_file_of_two_packages_is_the_same_in_both():
    hashes = defaultdict(dict)  # path -> package -> hash of its file
    for distribution in metadata.distributions():
        name, root = distribution.name, str(distribution.locate_file(""))
        for file in distribution.files or ():
            if file.hash and str(file) not in HARMLESS:
                hashes[os.path.normpath(f"{root}/{file}")][name] = file.hash.value
    assert len(hashes) > 10_000
    different = {path: sorted(owners) for path, owners in hashes.items() if len(set(owners.values())) > 1}
    assert not different
