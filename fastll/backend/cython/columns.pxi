# The two passes over rows whose class axis is the slower one in memory: class by class, many rows at a
# time.
#
# A group of `WIDTH` neighbouring rows makes a tile: a block of `BLOCK` classes of each, gathered so that
# the rows are contiguous, and handled with one row to a lane. Each row's sum keeps the order that
# blocks.pxi lays down (element j of a block in accumulator j modulo the number of lanes), so that a row
# has the same result, to the bit, in either layout.

cdef enum:
    FEW = 32  # classes that are written at a time
    LINES_AHEAD = 8  # classes from the one that is read or written to the one that is prefetched

cdef struct Tile:
    # Vectors are of the compute dtype unless said otherwise.
    void* v  # logits, capped
    void* u  # weights or targets
    # FEW classes
    void* slope  # derivatives of the soft cap
    void* out
    # one number a row
    void* tops  # m
    void* floors  # of `window`
    void* magics
    void* factors
    void* scales
    # an accumulator, of one number a row, for each lane
    void* sums
    void* more_sums
    double* wide  # the sums on their way to one


cdef Py_ssize_t lay_out_tile(const Call* call, char* memory, Tile* tile, real like) noexcept nogil:
    """Place a tile in memory; its size in bytes."""
    cdef Py_ssize_t line = WIDTH * sizeof(real), accumulators = LANES * LANES * sizeof(double)
    cdef Py_ssize_t classes = min(BLOCK, call.classes)
    cdef char* at = memory
    tile.v, at = at, at + classes * line
    tile.u, at = at, at + (classes * line if call.spread or call.b.address != NULL else 0)
    tile.slope, at = at, at + (FEW * line if call.capped else 0)
    tile.out, at = at, at + FEW * line
    tile.tops, at = at, at + line
    tile.floors, at = at, at + line
    tile.magics, at = at, at + line
    tile.factors, at = at, at + line
    tile.scales, at = at, at + line
    tile.sums, at = at, at + accumulators
    tile.more_sums, at = at, at + accumulators
    tile.wide, at = <double*> at, at + accumulators
    return at - memory


cdef inline Py_ssize_t parts_of(Py_ssize_t n) noexcept nogil:
    """Number of parts of FEW classes, the last one perhaps smaller."""
    return (n + FEW - 1) // FEW


cdef void gather(
    const Operand* x, const Group* group, Py_ssize_t j, Py_ssize_t n, real* tile
) noexcept nogil:
    """Classes j to j + n of the rows into a tile: class by class, WIDTH rows apart."""
    cdef const char* source = start_of(x, group.outer, group.inner) + j * x.classes
    cdef Py_ssize_t i, w
    for i in range(n):
        if x.format != IN_PLACE and x.native and group.count == WIDTH:
            for w in range(WIDTH // lanes_of(tile)):
                w *= lanes_of(tile)
                store_all(tile + w, load_strided(<const real*> (source + w * x.inner), x.inner))
        elif x.format != IN_PLACE:
            read_block(x.format, x.swapped, source, x.inner, group.count, tile)
        elif group.count == WIDTH:
            for w in range(WIDTH // lanes_of(tile)):
                prefetch_vector(source + LINES_AHEAD * x.classes + w * 128)
            memcpy(tile, source, WIDTH * sizeof(real))
        else:
            memcpy(tile, source, group.count * sizeof(real))
        source += x.classes
        tile += WIDTH


cdef void scatter(
    const Operand* x, const Group* group, Py_ssize_t j, Py_ssize_t n, const real* tile
) noexcept nogil:
    """A tile back into classes j to j + n of the rows."""
    cdef char* target = start_of(x, group.outer, group.inner) + j * x.classes
    cdef Py_ssize_t i, w
    for i in range(n):
        if x.format != IN_PLACE and x.native and group.count == WIDTH:
            for w in range(WIDTH // lanes_of(tile)):
                w *= lanes_of(tile)
                store_strided(<real*> (target + w * x.inner), x.inner, load_all(tile + w))
        elif x.format != IN_PLACE:
            write_block(x.format, tile, target, x.inner, group.count)
        elif group.count < WIDTH:
            memcpy(target, tile, group.count * sizeof(real))
        elif x.streamed and <size_t> target % 64 == 0:
            for w in range(WIDTH // lanes_of(tile)):
                stream_all(<real*> target + w * lanes_of(tile), load_all(tile + w * lanes_of(tile)))
        else:
            for w in range(WIDTH // lanes_of(tile)):
                prefetch_vector(target + LINES_AHEAD * x.classes + w * 128)
            memcpy(target, tile, WIDTH * sizeof(real))
        target += x.classes
        tile += WIDTH


cdef inline real* accumulator(real* sums, Py_ssize_t j, int lanes) noexcept nogil:
    """The accumulator of element j of a block."""
    return sums + (j & (lanes - 1)) * lanes


cdef inline void clear(real* sums, Py_ssize_t n, int lanes) noexcept nogil:
    """Set the accumulators of n elements to 0."""
    memset(sums, 0, min(n, lanes) * lanes * sizeof(real))


cdef inline void fold_sums(const real* sums, Py_ssize_t n, int lanes, double* wide) noexcept nogil:
    """The sums of n elements, folded by halves in float64, as the first vector at `wide`."""
    cdef Py_ssize_t used = min(n, lanes), half = lanes // 2, i
    for i in range(used * lanes):
        wide[i] = sums[i]
    while half > 0:
        for i in range(half * lanes, used * lanes):
            wide[i - half * lanes] = wide[i - half * lanes] + wide[i]
        used = min(used, half)
        half //= 2


cdef void aim(const Tile* tile, const Group* group, int shift, real like) noexcept nogil:
    """The references of the rows, a vector each."""
    cdef Py_ssize_t i
    for i in range(WIDTH):
        (<real*> tile.tops)[i] = <real> group.m[i]
        window(group.n[i], shift, <real*> tile.floors + i, <real*> tile.magics + i)


cdef void raise_maxima(Group* group, const real* v, Py_ssize_t n, bint fresh) noexcept nogil:
    """The rows' maxima with those of a tile; `fresh` rows have none yet."""
    cdef real[WIDTH] tops
    cdef Vec[real] top
    cdef State row
    cdef Py_ssize_t b, i, j
    for b in range(WIDTH // lanes_of(v)):
        top = splat(-<real> INFINITY)
        for j in range(n):
            top = maximum(load_all(v + j * WIDTH + b * lanes_of(v)), top)
        store_all(&tops[b * lanes_of(v)], top)
    if fresh:
        for i in range(WIDTH):
            group.m[i] = tops[i]
        for b in range(WIDTH // lanes_of(group.m)):
            i = b * lanes_of(group.m)
            store_all(&group.n[i], exponent_of(load_all(&group.m[i])))
        return
    for i in range(group.count):
        if tops[i] > group.m[i]:
            row = state_of(group, i)
            raise_maximum(&row, tops[i])
            set_state(group, i, &row)


cdef inline bint all_usable(const Group* group) noexcept nogil:
    cdef Py_ssize_t i
    cdef bint every = True
    for i in range(group.count):
        every &= usable(group.m[i])
    return every


cdef void fold_tile(
    const Tile* tile, Group* group, const real* v, Py_ssize_t n, bint fresh
) noexcept nogil:
    """`fold_block` for the rows of a tile."""
    cdef Vec[real] x, tops, floors, magics, counts, zero = splat(<real> 0), one = splat(<real> 1)
    cdef real[LANES] equal
    cdef real* sums
    cdef State row
    cdef Py_ssize_t b, i, j, w
    raise_maxima(group, v, n, fresh)
    aim(tile, group, SUM_SHIFT, <real> 0)
    for b in range(vectors_of(v, group.count)):
        w = b * lanes_of(v)
        tops = load_all(<real*> tile.tops + w)
        floors, magics = load_all(<real*> tile.floors + w), load_all(<real*> tile.magics + w)
        clear(<real*> tile.sums, n, lanes_of(v))
        counts = zero
        for j in range(n):
            x = load_all(v + j * WIDTH + w)
            sums = accumulator(<real*> tile.sums, j, lanes_of(v))
            store_all(
                sums,
                load_all(sums) + where_eq(x, tops, zero, exponential(x, floors, magics, v[0])),
            )
            counts = counts + where_eq(x, tops, one, zero)
        fold_sums(<real*> tile.sums, n, lanes_of(v), tile.wide)
        store_all(equal, counts)
        if all_usable(group):
            for i in range(lanes_of(v)):
                group.added[w + i] += tile.wide[i] * SUM_UNSHIFT
                group.k[w + i] += equal[i]
            continue
        for i in range(w, min(group.count, w + lanes_of(v))):
            if usable(group.m[i]):
                group.added[i] += tile.wide[i - w] * SUM_UNSHIFT
                group.k[i] += equal[i - w]
            else:
                row = state_of(group, i)
                sum_exact(v + i, WIDTH, n, &row)
                set_state(group, i, &row)


cdef void fold_weighted_tile(
    const Tile* tile, Group* group, real* v, const real* weights, Py_ssize_t n
) noexcept nogil:
    """`fold_weighted_block` for the rows of a tile."""
    cdef State row
    cdef Py_ssize_t b, i, j, w
    mask_block(v, weights, n * WIDTH, v)
    raise_maxima(group, v, n, False)
    aim(tile, group, SUM_SHIFT, <real> 0)
    for b in range(vectors_of(v, group.count)):
        w = b * lanes_of(v)
        clear(<double*> tile.sums, n, lanes_of(v))
        clear(<double*> tile.more_sums, n, lanes_of(v))
        for j in range(n):
            weigh_terms(
                load_all(v + j * WIDTH + w),
                load_all(weights + j * WIDTH + w),
                load_all(<real*> tile.tops + w),
                load_all(<real*> tile.floors + w),
                load_all(<real*> tile.magics + w),
                accumulator(<double*> tile.sums, j, lanes_of(v)),
                accumulator(<double*> tile.more_sums, j, lanes_of(v)),
                v[0],
            )
        fold_sums(<double*> tile.sums, n, lanes_of(v), tile.wide)
        fold_sums(<double*> tile.more_sums, n, lanes_of(v), <double*> tile.sums)
        for i in range(w, min(group.count, w + lanes_of(v))):
            row = state_of(group, i)
            if usable(row.m):
                row.added += tile.wide[i - w]
                row.k += (<double*> tile.sums)[i - w]
            else:
                weighted_sum_exact(v + i, weights + i, WIDTH, n, &row)
            set_state(group, i, &row)


cdef void linear_tile(
    const Tile* tile, Group* group, const real* v, const real* u, Py_ssize_t n, const double* before
) noexcept nogil:
    """`linear_block` for the rows of a tile, added to distance and mass.

    `before` is the maximum that the distance so far refers to.
    """
    cdef real[LANES] top
    cdef Vec[real] tops, weight
    cdef real* sums
    cdef real* weights
    cdef Py_ssize_t b, i, j, w
    for b in range(vectors_of(v, group.count)):
        w = b * lanes_of(v)
        for i in range(lanes_of(v)):
            top[i] = <real> (group.m[w + i] if group.m[w + i] > -INFINITY else 0.0)
        tops = load_all(<real*> top)
        clear(<real*> tile.sums, n, lanes_of(v))
        clear(<real*> tile.more_sums, n, lanes_of(v))
        for j in range(n):
            weight = load_all(u + j * WIDTH + w)
            sums = accumulator(<real*> tile.sums, j, lanes_of(v))
            weights = accumulator(<real*> tile.more_sums, j, lanes_of(v))
            store_all(
                sums,
                load_all(sums) + distances(load_all(v + j * WIDTH + w), weight, tops, v[0]),
            )
            store_all(weights, load_all(weights) + weight)
        fold_sums(<real*> tile.sums, n, lanes_of(v), tile.wide)
        for i in range(w, min(group.count, w + lanes_of(v))):
            group.distance[i] += times(group.mass[i], group.m[i] - before[i]) + tile.wide[i - w]
        fold_sums(<real*> tile.more_sums, n, lanes_of(v), tile.wide)
        for i in range(w, min(group.count, w + lanes_of(v))):
            group.mass[i] += tile.wide[i - w]


cdef void fetch_target_tile(
    const Call* call, const Group* group, Py_ssize_t j, Py_ssize_t n, real* u
) noexcept nogil:
    """`fetch_target` for a tile."""
    cdef double eps = call.options.label_smoothing
    cdef const real* w = <const real*> call.weight.address
    cdef const real* t = NULL
    cdef Py_ssize_t i
    cdef int l
    if call.target.address != NULL:
        gather(&call.target, group, j, n, u)
        t = u
    target_block(t, <const real*> NULL, n * WIDTH, 1.0 - eps, eps / call.classes, u)
    if w != NULL:
        for i in range(n):
            for l in range(WIDTH):
                u[i * WIDTH + l] = u[i * WIDTH + l] * w[j + i]


cdef void fetch_capped_tile(
    const Call* call, const Tile* tile, Group* group, Py_ssize_t j, Py_ssize_t n, real* v
) noexcept nogil:
    """`fetch_capped` for a tile, and what is at the labels."""
    cdef real cap = <real> call.options.softcap
    cdef real* slope = <real*> tile.slope
    cdef Py_ssize_t i, part, first, last
    gather(&call.x, group, j, n, v)
    if call.capped:
        for part in range(parts_of(n)):
            first, last = part * FEW, min(n, part * FEW + FEW)
            cap_block(v + first * WIDTH, (last - first) * WIDTH, cap, v + first * WIDTH, slope)
            for i in range(group.count if call.sparse else 0):
                if first <= group.y[i] - j < last:
                    group.slope_y[i] = slope[(group.y[i] - j - first) * WIDTH + i]
    for i in range(group.count if call.sparse else 0):
        if j <= group.y[i] < j + n:
            group.x_y[i] = v[(group.y[i] - j) * WIDTH + i]


cdef void fold_columns(const Call* call, Tile* tile, Group* group, real like) noexcept nogil:
    """`fold_rows` for rows side by side."""
    cdef double[WIDTH] before
    cdef Py_ssize_t j, n, block
    cdef real* v = <real*> tile.v
    cdef real* u = <real*> tile.u
    for block in range(blocks_of(call.classes)):
        j = block * BLOCK
        n = min(BLOCK, call.classes - j)
        fetch_capped_tile(call, tile, group, j, n, v)
        memcpy(before, group.m, sizeof(before))
        if call.b.address != NULL:
            gather(&call.b, group, j, n, u)
            fold_weighted_tile(tile, group, v, u, n)
        else:
            fold_tile(tile, group, v, n, block == 0 and call.state.address == NULL)
        if call.spread:
            fetch_target_tile(call, group, j, n, u)
            linear_tile(tile, group, v, u, n, before)


cdef void exp_tile(
    const Tile* tile, const Group* group, const real* v, Py_ssize_t n, real* out
) noexcept nogil:
    """`exp_block` for the rows of a tile."""
    cdef Vec[real] term, floors, magics, same, factors, scales
    cdef Py_ssize_t b, i, j, w
    for b in range(vectors_of(v, group.count)):
        w = b * lanes_of(v)
        floors, magics = load_all(<real*> tile.floors + w), load_all(<real*> tile.magics + w)
        same = exponential(load_all(<real*> tile.tops + w), floors, magics, v[0])
        factors, scales = load_all(<real*> tile.factors + w), load_all(<real*> tile.scales + w)
        for j in range(n):
            term = exponential(load_all(v + j * WIDTH + w), floors, magics, v[0])
            store_all(out + j * WIDTH + w, where_eq(term, same, factors, term * scales))
    for i in range(group.count):
        if not usable(group.m[i]):
            exp_exact(v + i, WIDTH, n, group.m[i], group.factor[i], out + i)


cdef void log_tile(
    const Group* group, const real* v, Py_ssize_t n, real* out
) noexcept nogil:
    """`log_block` for the rows of a tile."""
    cdef real[WIDTH] tops, lowered
    cdef Py_ssize_t i, j
    for i in range(WIDTH):
        tops[i], lowered[i] = <real> group.m[i], <real> group.log_s[i]
    for j in range(n):
        for i in range(WIDTH):
            out[j * WIDTH + i] = (v[j * WIDTH + i] - tops[i]) - lowered[i]


cdef void write_columns(const Call* call, Tile* tile, Group* group, real like) noexcept nogil:
    """`write_rows` for rows side by side, a few classes at a time."""
    cdef Py_ssize_t i, c, j, n, part
    # whether the tiles still hold what there is
    cdef bint whole = call.classes <= BLOCK and not call.capped and call.state.address == NULL
    cdef real* v = <real*> tile.v
    cdef real* u = <real*> tile.u
    cdef real* out = <real*> tile.out
    aim(tile, group, OUT_SHIFT, <real> 0)
    for i in range(WIDTH):
        (<real*> tile.factors)[i] = <real> group.factor[i]
        (<real*> tile.scales)[i] = <real> group.scale[i]
    for part in range(parts_of(call.classes)):
        j = part * FEW
        n = min(FEW, call.classes - j)
        if whole:
            v, u = <real*> tile.v + j * WIDTH, <real*> tile.u + j * WIDTH
        else:
            fetch_capped_tile(call, tile, group, j, n, v)
        if call.log:
            log_tile(group, v, n, out)
        else:
            exp_tile(tile, group, v, n, out)
        if call.spread:
            if not whole:
                fetch_target_tile(call, group, j, n, u)
            subtract_block(out, u, n * WIDTH, call.options.scale)
        if call.capped:
            multiply_block(out, <real*> tile.slope, n * WIDTH)
        for i in range(group.count if call.sparse else 0):
            if group.kept[i] == 0.0:
                for c in range(n):
                    out[c * WIDTH + i] = 0
            elif j <= group.y[i] < j + n:
                out[(group.y[i] - j) * WIDTH + i] = <real> group.g_y[i]
        scatter(&call.out, group, j, n, out)
