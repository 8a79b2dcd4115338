# Kernels over rows whose class axis is the slower one in memory: many rows at a time, class by class.
#
# `WIDTH` neighbouring rows make a tile: a block of `BLOCK` classes of each, gathered so that the rows
# are contiguous, and handled with one row to a lane. Each row's sum keeps the order that blocks.pxi
# lays down (element j of a block in accumulator j modulo the number of lanes), so that a row has the
# same result, to the bit, in either layout.

cdef enum:
    WIDTH = 64
    LINES_AHEAD = 8  # classes from the one that is written to the one that is prefetched

cdef struct Tile:
    # Memory for one call: see `tile_of`. Vectors are of the compute dtype unless said otherwise.
    void* memory
    Py_ssize_t size  # of a tile, in bytes
    State[WIDTH] rows
    # one number a row
    void* tops  # m
    void* floors  # of `window`
    void* magics
    # an accumulator, of one number a row, for each lane
    void* sums
    void* more_sums
    double* wide  # the sums on their way to one
    # BLOCK classes of WIDTH rows
    char* first


cdef int tile_of(const Call* call, int count, Tile* tile, real like) noexcept nogil:
    """Memory for `count` tiles, uninitialised; -1 where there is not enough."""
    cdef Py_ssize_t line = WIDTH * sizeof(real), accumulators = LANES * LANES * sizeof(double)
    tile.size = min(BLOCK, call.classes) * line
    tile.memory = malloc(3 * line + 3 * accumulators + count * tile.size + 64)
    if tile.memory == NULL:
        return -1
    cdef char* at = <char*> aligned(tile.memory)
    tile.tops, tile.floors, tile.magics = at, at + line, at + 2 * line
    at += 3 * line
    tile.sums, tile.more_sums = at, at + accumulators
    tile.wide = <double*> (at + 2 * accumulators)
    tile.first = at + 3 * accumulators
    return 0


cdef void gather(
    const Operand* x,
    Py_ssize_t outer,
    Py_ssize_t inner,
    Py_ssize_t j,
    Py_ssize_t n,
    Py_ssize_t count,
    real* tile,
) noexcept nogil:
    """Classes j to j + n of `count` rows into a tile: class by class, WIDTH rows apart."""
    cdef const char* source = start_of(x, outer, inner) + j * x.classes
    cdef Py_ssize_t i
    for i in range(n):
        if x.format != IN_PLACE:
            read_block(x.format, x.swapped, source, x.inner, count, tile)
        elif count == WIDTH:
            memcpy(tile, source, WIDTH * sizeof(real))
        else:
            memcpy(tile, source, count * sizeof(real))
        source += x.classes
        tile += WIDTH


cdef void scatter(
    const Operand* x,
    Py_ssize_t outer,
    Py_ssize_t inner,
    Py_ssize_t j,
    Py_ssize_t n,
    Py_ssize_t count,
    const real* tile,
) noexcept nogil:
    """A tile back into classes j to j + n of `count` rows."""
    cdef char* target = start_of(x, outer, inner) + j * x.classes
    cdef Py_ssize_t i
    cdef int line
    for i in range(n):
        if x.format != IN_PLACE:
            write_block(x.format, tile, target, x.inner, count)
        elif count == WIDTH:
            for line in range(<int> (WIDTH * sizeof(real) // 128)):
                prefetch_vector(target + LINES_AHEAD * x.classes + line * 128)
            memcpy(target, tile, WIDTH * sizeof(real))
        else:
            memcpy(target, tile, count * sizeof(real))
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


cdef void set_reference(Tile* tile, Py_ssize_t i, real like) noexcept nogil:
    """Bring the lane of row i in line with the row's reference."""
    cdef State* row = &tile.rows[i]
    (<real*> tile.tops)[i] = <real> row.m
    window(row.n, SUM_SHIFT, <real*> tile.floors + i, <real*> tile.magics + i)


cdef void begin_tile(
    Tile* tile,
    const Operand* state,
    Py_ssize_t outer,
    Py_ssize_t inner,
    Py_ssize_t count,
    real like,
) noexcept nogil:
    """Start `count` rows from their state, or from the identity. Idle lanes hold harmless numbers."""
    cdef Py_ssize_t i
    for i in range(WIDTH):
        if i < count:
            tile.rows[i] = begin(state, outer, inner + i)
        else:
            tile.rows[i] = begin(&NOTHING, 0, 0)
        set_reference(tile, i, like)


cdef void raise_maxima(Tile* tile, const real* v, Py_ssize_t n, Py_ssize_t count) noexcept nogil:
    """The rows' maxima with those of a tile."""
    cdef real[LANES] top
    cdef Py_ssize_t i, j, w
    cdef int l
    for i in range(vectors_of(v, count)):
        w = i * lanes_of(v)
        fill(top, -<real> INFINITY)
        for j in range(n):
            for l in range(lanes_of(v)):
                top[l] = maximum(v[j * WIDTH + w + l], top[l])
        for l in range(<int> min(lanes_of(v), count - w)):
            if top[l] > tile.rows[w + l].m:
                raise_maximum(&tile.rows[w + l], top[l])
                set_reference(tile, w + l, <real> 0)


cdef void fold_tile(Tile* tile, const real* v, Py_ssize_t n, Py_ssize_t count) noexcept nogil:
    """`fold_block` for the rows of a tile."""
    cdef real[LANES] tops, floors, magics, counts
    cdef real term, zero = 0, one = 1
    cdef const real* x
    cdef real* sums
    cdef State* row
    cdef Py_ssize_t i, j, w
    cdef int l
    raise_maxima(tile, v, n, count)
    for i in range(vectors_of(v, count)):
        w = i * lanes_of(v)
        for l in range(lanes_of(v)):
            tops[l] = (<real*> tile.tops)[w + l]
            floors[l] = (<real*> tile.floors)[w + l]
            magics[l] = (<real*> tile.magics)[w + l]
        clear(<real*> tile.sums, n, lanes_of(v))
        fill(counts, zero)
        for j in range(n):
            x = v + j * WIDTH + w
            sums = accumulator(<real*> tile.sums, j, lanes_of(v))
            for l in range(lanes_of(v)):
                term = exponential(x[l], floors[l], magics[l])
                sums[l] = sums[l] + (zero if x[l] == tops[l] else term)
                counts[l] = counts[l] + (one if x[l] == tops[l] else zero)
        fold_sums(<real*> tile.sums, n, lanes_of(v), tile.wide)
        for l in range(<int> min(lanes_of(v), count - w)):
            row = &tile.rows[w + l]
            if row.usable:
                row.e += tile.wide[l] * SUM_UNSHIFT / row.lead
                row.k += counts[l]
            else:
                sum_exact(v + w + l, WIDTH, n, row)


cdef void fold_weighted_tile(
    Tile* tile, real* v, const real* b, Py_ssize_t n, Py_ssize_t count
) noexcept nogil:
    """`fold_weighted_block` for the rows of a tile."""
    cdef real[LANES] tops, floors, magics
    cdef real term, weight, zero = 0
    cdef const real* x
    cdef const real* y
    cdef double* sums
    cdef double* top_sums
    cdef State* row
    cdef Py_ssize_t i, j, w
    cdef int l
    mask_block(v, b, n * WIDTH, v)
    raise_maxima(tile, v, n, count)
    for i in range(vectors_of(v, count)):
        w = i * lanes_of(v)
        for l in range(lanes_of(v)):
            tops[l] = (<real*> tile.tops)[w + l]
            floors[l] = (<real*> tile.floors)[w + l]
            magics[l] = (<real*> tile.magics)[w + l]
        clear(<double*> tile.sums, n, lanes_of(v))
        clear(<double*> tile.more_sums, n, lanes_of(v))
        for j in range(n):
            x = v + j * WIDTH + w
            y = b + j * WIDTH + w
            sums = accumulator(<double*> tile.sums, j, lanes_of(v))
            top_sums = accumulator(<double*> tile.more_sums, j, lanes_of(v))
            for l in range(lanes_of(v)):
                term = exponential(x[l], floors[l], magics[l])
                term = zero if x[l] == tops[l] else term
                weight = y[l] if x[l] == tops[l] else zero
                sums[l] = sums[l] + (<double> term * SUM_UNSHIFT) * <double> y[l]
                top_sums[l] = top_sums[l] + weight
        fold_sums(<double*> tile.sums, n, lanes_of(v), tile.wide)
        fold_sums(<double*> tile.more_sums, n, lanes_of(v), <double*> tile.sums)
        for l in range(<int> min(lanes_of(v), count - w)):
            row = &tile.rows[w + l]
            if row.usable:
                row.e += tile.wide[l] / row.lead
                row.k += (<double*> tile.sums)[l]
            else:
                weighted_sum_exact(v + w + l, b + w + l, WIDTH, n, row)


cdef void exp_tile(
    const Tile* tile,
    const real* v,
    Py_ssize_t n,
    Py_ssize_t count,
    const double* factors,
    real* out,
) noexcept nogil:
    """`exp_block` for the rows of a tile."""
    cdef real[LANES] tops, floors, magics, top_values, scales, y
    cdef real value
    cdef const real* x
    cdef const State* row
    cdef Py_ssize_t i, j, w
    cdef int l
    for i in range(vectors_of(v, count)):
        w = i * lanes_of(v)
        for l in range(lanes_of(v)):
            row = &tile.rows[w + l]
            window(row.n, OUT_SHIFT, &floors[l], &magics[l])
            tops[l] = <real> row.m
            top_values[l] = <real> factors[w + l]
            scales[l] = <real> (factors[w + l] / row.lead * OUT_UNSHIFT)
        for j in range(n):
            x = v + j * WIDTH + w
            for l in range(lanes_of(v)):
                value = exponential(x[l], floors[l], magics[l]) * scales[l]
                y[l] = top_values[l] if x[l] == tops[l] else value
            store(out + j * WIDTH + w, lanes_of(v), y)
        for l in range(<int> min(lanes_of(v), count - w)):
            row = &tile.rows[w + l]
            if not row.usable:
                exp_exact(v + w + l, WIDTH, n, row.m, factors[w + l], out + w + l)


cdef void log_tile(
    const Tile* tile,
    const real* v,
    Py_ssize_t n,
    Py_ssize_t count,
    const double* logs,
    real* out,
) noexcept nogil:
    """`log_block` for the rows of a tile."""
    cdef real[WIDTH] tops, lowered
    cdef Py_ssize_t i, j
    for i in range(WIDTH):
        tops[i], lowered[i] = <real> tile.rows[i].m, <real> logs[i]
    for j in range(n):
        for i in range(WIDTH):
            out[j * WIDTH + i] = (v[j * WIDTH + i] - tops[i]) - lowered[i]


cdef void target_tile(
    const Call* call, real* t, Py_ssize_t j, Py_ssize_t n
) noexcept nogil:
    """`target_block` for a tile, in place."""
    cdef double eps = call.options.label_smoothing
    cdef const real* w = <const real*> call.weight.address
    cdef const real* source = t if call.target.address != NULL else NULL
    cdef Py_ssize_t i
    cdef int l
    target_block(source, <const real*> NULL, n * WIDTH, 1.0 - eps, eps / call.classes, t)
    if w != NULL:
        for i in range(n):
            for l in range(WIDTH):
                t[i * WIDTH + l] = t[i * WIDTH + l] * w[j + i]


cdef void linear_tile(
    const Tile* tile,
    const real* v,
    const real* u,
    Py_ssize_t n,
    Py_ssize_t count,
    const double* before,
    double* distance,
    double* mass,
) noexcept nogil:
    """`linear_block` for the rows of a tile, added to distance and mass.

    `before` is the maximum that the distance so far refers to.
    """
    cdef real[LANES] tops
    cdef real term, zero = 0
    cdef const real* x
    cdef const real* y
    cdef real* sums
    cdef real* weights
    cdef Py_ssize_t i, j, w
    cdef int l
    for i in range(vectors_of(v, count)):
        w = i * lanes_of(v)
        for l in range(lanes_of(v)):
            tops[l] = <real> (tile.rows[w + l].m if tile.rows[w + l].m > -INFINITY else 0.0)
        clear(<real*> tile.sums, n, lanes_of(v))
        clear(<real*> tile.more_sums, n, lanes_of(v))
        for j in range(n):
            x = v + j * WIDTH + w
            y = u + j * WIDTH + w
            sums = accumulator(<real*> tile.sums, j, lanes_of(v))
            weights = accumulator(<real*> tile.more_sums, j, lanes_of(v))
            for l in range(lanes_of(v)):
                term = y[l] * (tops[l] - x[l])
                sums[l] = sums[l] + (zero if y[l] == zero else term)
                weights[l] = weights[l] + y[l]
        fold_sums(<real*> tile.sums, n, lanes_of(v), tile.wide)
        for l in range(<int> min(lanes_of(v), count - w)):
            distance[w + l] += times(mass[w + l], tile.rows[w + l].m - before[w + l]) + tile.wide[l]
        fold_sums(<real*> tile.more_sums, n, lanes_of(v), tile.wide)
        for l in range(<int> min(lanes_of(v), count - w)):
            mass[w + l] += tile.wide[l]


cdef int logsumexp_columns(
    const Call* call, Py_ssize_t start, Py_ssize_t stop, real like
) noexcept nogil:
    cdef Tile tile
    if tile_of(call, 2, &tile, like) < 0:
        return -1
    cdef real* v = <real*> tile.first
    cdef real* b = <real*> (tile.first + tile.size)
    cdef Py_ssize_t i, j, n, block, outer, inner, count, row = start
    while row < stop:
        outer, inner = row // call.inner, row % call.inner
        count = min(WIDTH, min(call.inner - inner, stop - row))
        begin_tile(&tile, &call.state, outer, inner, count, like)
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            gather(&call.x, outer, inner, j, n, count, v)
            if call.b.address == NULL:
                fold_tile(&tile, v, n, count)
            else:
                gather(&call.b, outer, inner, j, n, count, b)
                fold_weighted_tile(&tile, v, b, n, count)
        for i in range(count):
            settle(&tile.rows[i])
            if call.state.address != NULL:
                store_state(&call.state, outer, inner + i, &tile.rows[i])
            if call.out.address != NULL:
                store_lse(call, outer, inner + i, &tile.rows[i], like)
        row += count
    free(tile.memory)
    return 0


cdef int softmax_columns(
    const Call* call, Py_ssize_t start, Py_ssize_t stop, real like
) noexcept nogil:
    cdef Tile tile
    if tile_of(call, 2, &tile, like) < 0:
        return -1
    cdef real* v = <real*> tile.first
    cdef real* y = <real*> (tile.first + tile.size)
    cdef double[WIDTH] factors
    cdef State* state
    cdef Py_ssize_t i, j, n, block, outer, inner, count, row = start
    memset(factors, 0, sizeof(factors))
    while row < stop:
        outer, inner = row // call.inner, row % call.inner
        count = min(WIDTH, min(call.inner - inner, stop - row))
        begin_tile(&tile, &call.state, outer, inner, count, like)
        if call.state.address == NULL:
            for block in range(blocks_of(call.classes)):
                j = block * BLOCK
                n = min(BLOCK, call.classes - j)
                gather(&call.x, outer, inner, j, n, count, v)
                fold_tile(&tile, v, n, count)
        for i in range(count):
            state = &tile.rows[i]
            factors[i] = log_sum(state) if call.log else 1.0 / (state.e + state.k)
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            if call.classes > BLOCK or call.state.address != NULL:
                gather(&call.x, outer, inner, j, n, count, v)
            if call.log:
                log_tile(&tile, v, n, count, factors, y)
            else:
                exp_tile(&tile, v, n, count, factors, y)
            scatter(&call.out, outer, inner, j, n, count, y)
        row += count
    free(tile.memory)
    return 0


cdef void fetch_tile(
    const Call* call,
    Py_ssize_t outer,
    Py_ssize_t inner,
    Py_ssize_t j,
    Py_ssize_t n,
    Py_ssize_t count,
    real* v,
    real* slope,
) noexcept nogil:
    """`fetch_capped` for a tile."""
    gather(&call.x, outer, inner, j, n, count, v)
    if call.options.softcap != 0.0:
        cap_block(v, n * WIDTH, <real> call.options.softcap, v, slope)


cdef void fetch_target_tile(
    const Call* call,
    Py_ssize_t outer,
    Py_ssize_t inner,
    Py_ssize_t j,
    Py_ssize_t n,
    Py_ssize_t count,
    real* u,
) noexcept nogil:
    """`fetch_target` for a tile."""
    if call.target.address != NULL:
        gather(&call.target, outer, inner, j, n, count, u)
    target_tile(call, u, j, n)


cdef int cross_entropy_columns(
    const Call* call, Py_ssize_t start, Py_ssize_t stop, real like
) noexcept nogil:
    cdef Tile tile
    if tile_of(call, 4, &tile, like) < 0:
        return -1
    cdef real* v = <real*> tile.first
    cdef real* u = <real*> (tile.first + tile.size)
    cdef real* slope = <real*> (tile.first + 2 * tile.size)
    cdef real* g = <real*> (tile.first + 3 * tile.size)
    cdef bint capped = call.options.softcap != 0.0
    cdef bint sparse = call.labels.address != NULL
    cdef bint spread = not sparse or call.options.label_smoothing != 0.0
    cdef const real* w = <const real*> call.weight.address
    cdef int64_t[WIDTH] y
    cdef bint[WIDTH] kept
    cdef double[WIDTH] x_y, slope_y, distance, mass, before, factors, g_y
    cdef double w_y
    cdef Outcome result
    cdef State* state
    cdef Py_ssize_t i, j, c, n, block, outer, inner, count, row = start
    memset(factors, 0, sizeof(factors))
    while row < stop:
        outer, inner = row // call.inner, row % call.inner
        count = min(WIDTH, min(call.inner - inner, stop - row))
        begin_tile(&tile, &NOTHING, 0, 0, count, like)
        for i in range(count):
            y[i], kept[i] = 0, True
            distance[i] = mass[i] = x_y[i] = 0.0
            slope_y[i] = 1.0
            if sparse:
                memcpy(&y[i], start_of(&call.labels, outer, inner + i), 8)
                kept[i] = y[i] != call.options.ignore_index
        for block in range(blocks_of(call.classes)):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            fetch_tile(call, outer, inner, j, n, count, v, slope)
            for i in range(count):
                before[i] = tile.rows[i].m
            fold_tile(&tile, v, n, count)
            if spread:
                fetch_target_tile(call, outer, inner, j, n, count, u)
                linear_tile(&tile, v, u, n, count, before, distance, mass)
            for i in range(count):
                if sparse and kept[i] and j <= y[i] < j + n:
                    x_y[i] = v[(y[i] - j) * WIDTH + i]
                    slope_y[i] = slope[(y[i] - j) * WIDTH + i] if capped else 1.0
        for i in range(count):
            state = &tile.rows[i]
            settle(state)
            if call.lse.address != NULL:
                put(start_of(&call.lse, outer, inner + i), state.m + log_sum(state), like)
            w_y = w[y[i]] if sparse and w != NULL and kept[i] else 1.0
            result = finish(
                state, call.classes, sparse, x_y[i], w_y, distance[i], mass[i], &call.options
            )
            factors[i], g_y[i] = result.factor, result.g_y * slope_y[i]
            put(start_of(&call.loss, outer, inner + i), result.loss if kept[i] else 0.0, like)
        for block in range(blocks_of(call.classes) if call.grad.address != NULL else 0):
            j = block * BLOCK
            n = min(BLOCK, call.classes - j)
            if call.classes > BLOCK:
                fetch_tile(call, outer, inner, j, n, count, v, slope)
            exp_tile(&tile, v, n, count, factors, g)
            if spread:
                if call.classes > BLOCK:
                    fetch_target_tile(call, outer, inner, j, n, count, u)
                subtract_block(g, u, n * WIDTH, call.options.scale)
            if capped:
                multiply_block(g, slope, n * WIDTH)
            for i in range(count):
                if not kept[i]:
                    for c in range(n):
                        g[c * WIDTH + i] = 0
                elif sparse and j <= y[i] < j + n:
                    g[(y[i] - j) * WIDTH + i] = <real> g_y[i]
            scatter(&call.grad, outer, inner, j, n, count, g)
        row += count
    free(tile.memory)
    return 0
