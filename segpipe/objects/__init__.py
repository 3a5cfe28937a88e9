"""Objects of windows become objects of the scene: pure functions on arrays, in 2D and in 3D.

Each window of the lattice answers with objects under ids of its own (`window`). An object of a window
that owns elements of the window's cell is a *node*, named by the window's position and its local id,
however the scene is cut into blocks (`nodes`). A window also sees into its neighbours' cells: what it
says there, its *overhang*, is compared with what the neighbour says, which tells the nodes that are one
object (`nodes`). At the end the nodes are joined and numbered (`merge`). Counts and scores are
added as whole numbers, so no order, block size or repetition of a window changes a bit.

All boxes and positions are on the lattice's grid.
"""
