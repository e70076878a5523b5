"""Prints what the other te_*.py find, a JSON line each. It is a separate process, because megatron.core looks for Transformer
Engine once, when it is imported, and has to find the stand-in."""

import json

import te_stand_in


def main() -> None:
    te_stand_in.install()
    from frpo_nemo import stack

    stack.uses_transformer_engine = lambda precision: True  # as with a GPU; before the modules that import it by name
    import te_calls
    import te_fp8
    import te_layers
    import te_optimizer

    for kind, found in (
        ("layers", te_layers.all_layouts()),
        ("expert layers", te_layers.expert_layouts()),
        ("calls", te_calls.all_families()),
        ("fp8", te_fp8.all_recipes()),
        ("optimizer", te_optimizer.both_ways()),
    ):
        for facts in found:
            print(json.dumps({"kind": kind} | facts), flush=True)


if __name__ == "__main__":
    main()
