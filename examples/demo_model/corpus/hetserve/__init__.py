"""Questions about HetServe, answered from its documentation."""
