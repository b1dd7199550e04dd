"""Programs: a row of int64 per operation, of which some are fp64 (from column `REALS` on).

Addresses are those of the process, strides are in bytes. Unless it says otherwise, numbers are of
fp32; weights and what caches hold are of the `KIND` of the operation.
"""

COLUMNS, REALS = 40, 37

PRODUCT, ATTEND, NORM, WIDTH_FIX, ROUTE, GROUP, GATHER, EXPERT, COMBINE = range(9)  # column 0
PACK, PANEL_PRODUCT, KEEP, LOOK = range(9, 13)  # of sweeps

KIND, TASKS = 1, 2
BF16, FP32 = 0, 1

# out = activation(norm(x) * matrix + bias) [* (norm(x) * gate + gate's bias)]
(
    P_X,
    P_X_STRIDE,
    P_LENGTH,
    P_NORM,  # 0 none, 1 by the root mean square, 2 of layers; its weight, its bias or 0
    P_NORM_WEIGHT,
    P_NORM_BIAS,
    P_MATRIX,
    P_STRIDE,
    P_OUTPUTS,
    P_BIAS,
    P_OUT,
    P_OUT_STRIDE,
    P_ADDS,  # to what is there
    P_CHUNK,  # outputs of a task
    P_ACTIVATION,  # its number in ACTIVATIONS, from 1
    P_GATE,
    P_GATE_BIAS,
    P_GATE_OUT,
    P_TILES,  # rows from which on they are multiplied in tiles; 0: never
) = range(3, 22)
P_EPS = REALS

# norms and turns of queries and keys, the new key and value into the cache, attention
(
    A_QKV,
    A_QKV_STRIDE,
    A_HEADS,
    A_KV_HEADS,
    A_WIDTH,
    A_KEYS,
    A_VALUES,
    A_ROW_STRIDE,
    A_POSITION_STRIDE,
    A_HEAD_STRIDE,
    A_LENGTHS,  # positions that the cache of each row holds, int64
    A_OUT,
    A_OUT_STRIDE,
    A_COS,  # (positions, half)
    A_SIN,
    A_HALF,  # of the width that turns; 0: none
    A_QUERY_NORM,
    A_KEY_NORM,
    A_WINDOW,  # positions that are looked back at; 0: all
    A_SINKS,
    A_RELATIVE,  # bias by distance, (heads, distances)
    A_RELATIVE_STRIDE,
    A_IS_CROSS,  # keys and values are there already
    # of sweeps, where `A_KEYS` are (heads, slots, width), `A_VALUES` (heads, width, slots)
    A_SLOTS,
    A_SEQUENCES,  # a row of `SEQUENCE` columns for each
    A_BLOCKS,  # (blocks, 2): a sequence, and the position or query at which a block of it begins
    A_NUM_BLOCKS,
    A_CONTEXT,  # where the keys of a layer are in what is kept of a position, values behind them
) = range(3, 31)
# row of its first query; positions of the past, of what is new; first slot; where what is kept
# of new and past positions begins, 0 for none
Q_ROW, Q_PAST, Q_LENGTH, Q_SLOT, Q_CONTEXT, Q_PAST_AT = range(6)
SEQUENCE = 6
A_SCALE, A_EPS = REALS, REALS + 1

N_X, N_X_STRIDE, N_LENGTH, N_NORM, N_WEIGHT, N_BIAS, N_OUT, N_OUT_STRIDE = range(3, 11)
N_EPS = REALS

# norms over all queries and all keys of a row, then bounds
W_QKV, W_QKV_STRIDE, W_QUERIES, W_KEYS, W_QUERY_NORM, W_KEY_NORM, W_ALL = range(3, 10)
W_CLIP, W_EPS = REALS, REALS + 1

# norm(x) beside x, the experts of each row by rising number, and their gates
(
    R_X,
    R_X_STRIDE,
    R_LENGTH,
    R_NORM,  # as P_NORM: kind, weight, bias
    R_NORM_WEIGHT,
    R_NORM_BIAS,
    R_NORMED,
    R_ROUTER,  # (experts, length)
    R_BIAS,
    R_EXPERTS,
    R_PER_ROW,
    R_HOW,  # one of the ROUTERS
    R_CHOICE_BIAS,  # of fp32
    R_NORMALIZES,
    R_IDS,  # (rows, per row) of int64
    R_GATES,  # (rows, per row)
    R_SHARED_GATE,  # (length,), of the expert of all rows
    R_SHARED,  # (rows,) its gates
) = range(3, 21)
R_EPS, R_SCALE = REALS, REALS + 1
FIRST, SIGMOID_FIRST, SOFTMAX, SIGMOID = range(4)  # ROUTERS: the best one alone, or several

# Where pairs of rows and experts stand, all of int64: how many experts are wanted; which; where
# the pairs of each begin; the pairs in that order; the place of each pair; where the panels of 16
# pairs of each begin; room for a number per expert.
(
    G_IDS,
    G_PER_ROW,
    G_EXPERTS,
    G_WANTED,
    G_IDS_WANTED,
    G_BEGINS,
    G_ORDER,
    G_PLACES,
    G_STARTS,
    G_COUNTS,
) = range(3, 13)

# of wanted experts M_BEGIN .. M_END - 1, or of all if M_END is 0
(
    M_WANTED,
    M_IDS_WANTED,
    M_BEGINS,
    M_ORDER,
    M_PER_ROW,
    M_BEGIN,
    M_END,
    M_WEIGHTS,  # a row of addresses per expert: WEIGHTS columns, in the order of EXPERT_WEIGHTS
    M_X,
    M_X_STRIDE,
    M_LENGTH,
    M_OUTPUTS,
    M_OUT,
    M_GATE_OUT,
    M_CHUNK,
    M_ACTIVATION,
    M_MATRIX,  # numbers of weights: the matrix, its bias, the gate, its bias; 0 none
    M_BIAS,
    M_GATE,
    M_GATE_BIAS,
    M_TILES,  # pairs of an expert from which on they are multiplied in tiles; 0: never
    # of sweeps; M_ORDER may be 0: rows as they stand
    M_STARTS,
    M_NORM,  # as P_NORM: kind, weight, bias; else an expert's own
    M_NORM_WEIGHT,
    M_NORM_BIAS,
    M_OUT_STRIDE,
    M_HOW,  # of the HOWS
) = range(3, 30)
M_EPS = REALS
WRITES, ADDS, PACKS = range(3)  # HOWS: to rows, to what is in rows, to panels for the next product
EXPERT_WEIGHTS = ("", "norm", "wi_0", "wi_1", "wo", "bi_0", "bi_1", "bo")
WEIGHTS = len(EXPERT_WEIGHTS)
NORM_WEIGHT = 1

# x += the sum of gate * expert's output, and of the shared expert's
(
    C_X,
    C_X_STRIDE,
    C_LENGTH,
    C_PER_ROW,
    C_PLACES,
    C_GATES,  # 0: none
    C_OUTS,  # (pairs, length)
    C_SHARED,  # (rows, length)
    C_SHARED_GATES,  # 0: none
) = range(3, 12)
