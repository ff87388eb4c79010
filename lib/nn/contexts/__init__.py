"""CVFP's machinery: context vectors as a fixed point (cvfp.md), in the order to read it.

context, one_step          the recurrence over time; the map of one step, rows in parallel
halo, exact                true trajectories: of one long stream by segments; of many documents
objective                  the loss of a step, from `diversity` and `memory_term`
first_sweep, chunk, jacobi sweeps over a stream on disk, whose files are `sweeps`, `sweep_state`
frozen, stream_contexts    vectors made once: by a finished model; by the first phase
predicting                 the token block and the head that read them
solver, arms, handover     what a model asks of its solver; the controls; phase 1 to phase 2
probes, pace, budget       diagnostics, the line of progress, memory before it starts
"""
