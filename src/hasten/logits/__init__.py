"""Rules over a row's logits: what may come next, token by token (engine/contracts.py, `LogitsRule`).

A rule is shared by all rows that use it; what a row has said so far is a state, and states are values: `advance` returns a
new one and leaves the old one usable, so that every path of a draft tree has its own and a rejected branch costs nothing.
`apply` sets the logits of forbidden tokens to -inf. The verifier asks the rule at every node: a drafted token stands only
where the rule allows it. `forced` names tokens that must follow, which the engine then drafts and verifies like others.

`grammar.py` compiles a `types.Grammar` into such a rule with llguidance. Beside it: `_schema.py` (which schema keywords
are enforced, and the form a schema has before it is compiled), `_regex.py` and `_lark.py` (what is understood of these
languages, and how large they may be), `_compile.py` (llguidance itself). All of them check before they hand over: whatever
is not understood is refused by name and place, and nothing that is asked for is dropped.
"""
