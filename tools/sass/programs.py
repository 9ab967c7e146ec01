"""What a warp of the kernels that matter runs: parts of their sources, and how often.

Everything is of two groups of 32 and 8 channels, as TokenFlow has them. How often a loop runs
follows from shapes; what depends on the numbers themselves is assumed, and stands here by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .source import Part, Place

CHANNELS = 40
GROUPS = 2
#: Steps of 16 columns: the channels, and three spare columns.
STEPS = 3
#: Codes that a tile of packed codes, a record and a group hold.
TILE, RECORD, GROUP = 128, 512, 4
#: Threads of a block of a kernel that works on planes, and its warps.
PLANE_THREADS, PLANE_WARPS = 256, 8

#: Assumed: rows with a second group within the bound of its coarse score (docs/kernels.md).
SECOND_GROUPS = 0.039
ALONG_Y = "i < block.count * height * width;"
SAMPLER = "sample_kernel<(LogitType)0, 512>"  # of float32
SAMPLER_THREADS = 512

Path = tuple[Place, ...]


@dataclass(frozen=True)
class Program:
    """What a warp of a kernel runs.

    `once` is what it runs beside the parts, the whole kernel where that is empty. `loads` are those
    from the L2 that each wait for the one before, and `barriers` the steps of a block that end in
    one, both as read from the source.
    """

    kernel: str
    parts: tuple[Part, ...]
    once: Path = ()
    loads: int = 0
    barriers: int = 0


def _at(path: Path, file: str, text: str, nth: int = 0) -> Path:
    return (*path, Place(file, text, nth))


def coarse_score() -> Program:
    """A tile of codes and a warp's 64 rows."""
    kernel = _at((), "coarse_score.cu", "coarse_score_kernel(const __grid_constant__")
    tile = _at(kernel, "coarse_score.cu", "for (int i = 0; i < block.tiles; ++i) {")
    codes = _at(tile, "coarse_score.cu", "for (int c = 0; c < kTileFragments; ++c) {")
    end = _at(tile, "coarse_score.cu", "if (ends_record(runs, block, i)) {")
    parts = (Part(codes, TILE / 16), Part(end, TILE / RECORD))
    return Program("coarse_score_kernel<3, 4>", parts, tile)


def warpgroup_score() -> Program:
    """A tile of codes and a warp's 16 rows; one warp of 16 asks for tiles."""
    kernel = _at((), "coarse_score_wgmma.cu", "warpgroup_score_kernel(const __grid_constant__")
    tile = _at(kernel, "coarse_score_wgmma.cu", "for (int i = 0; i < block.tiles; ++i) {")
    fetch = _at(tile, "coarse_score_wgmma.cu", "if (threadIdx.x == 0 && i + kAhead")
    end = _at(tile, "coarse_score_wgmma.cu", "if (ends_record(runs, block, i)) {")
    parts = (Part(fetch, 1 / 16), Part(end, TILE / RECORD))
    return Program("warpgroup_score_kernel<3>", parts, tile)


def refine(records: int, near: float = 1 + SECOND_GROUPS, rescored: float = 0) -> Program:
    """A row with that many records.

    `near` groups are within the bound of the best coarse score; of `rescored` records a second one
    is, so that their tiles are scored again.
    """
    rounds = -(-records // 32)

    def at(path: Path, text: str) -> Path:
        return _at(path, "refine.cu", text)

    kernel = at((), "refine_kernel(const __grid_constant__")
    looks = at(kernel, "for (int r0 = 0; r0 < num_records")
    groups = at(looks, "for (; near != 0; near &= near - 1) {")
    look = at(groups, "look_at(const SearchArgs& args")
    team = at(look, "for (unsigned lanes = ballot(codes")
    score = at(team, "exact_score(const SearchArgs& args")
    score_group = at(score, "for (int g = 0; g < layout.groups; ++g)")
    dot = at(score_group, "for (int d = layout.begin[g] + lane_index() % kLanes")
    error = at(kernel, "row_squared_error(const SearchArgs& args")
    error_group = at(error, "for (int g = 0; g < layout.groups; ++g)")
    difference = at(error_group, "for (int d = layout.begin[g] + lane_index()")
    never = [
        at(kernel, "if (is_dropped(args)) {"),
        at(kernel, "is_zero(const float* row, int dim) {"),
        at(kernel, "nearest_to_zero(const SearchArgs& args)"),
        # Outliers.
        at(looks, "outlier_margin(const SearchArgs& args"),
        at(looks, "if (lane < codes.num_outliers) {"),
        at(looks, "const double most = max_over_warp(score, 1)"),
        # What even float64 does not tell apart.
        at(team, "for (; near != 0; near &= near - 1) {"),
    ]
    again = at(groups, "if (rescore) {")
    half = at(again, "for (int part = 0; part < kTileFragments / kFragments; ++part) {")
    step = at(half, "for (int s = 0; s < steps; ++s) {")
    tiles = RECORD / TILE * rescored
    eight_lanes = -(-32 // 8) + -(-8 // 8)
    parts = [
        Part(at(kernel, "for (int r = lane; r < num_records"), rounds, "LDG"),
        *(Part(looks, rounds), Part(groups, near), Part(look, near), Part(team, near)),
        *(Part(score, near), Part(score_group, GROUPS * near)),
        *(Part(dot, eight_lanes * near, "DFMA"), Part(error_group, GROUPS)),
        *(Part(difference, 2), Part(again, tiles), Part(half, 2 * tiles)),
        *(Part(step, 2 * STEPS * tiles),),
        *(Part(path, 0) for path in never),
    ]
    return Program("refine_kernel<(FragmentOrder)0>", tuple(parts), loads=8)


def _pack(vector: Place, measured: bool) -> Program:
    """Eight vectors, four lanes each."""

    def at(path: Path, text: str) -> Path:
        return _at(path, "pack.cuh", text)

    measure = at((vector,), "measure_vector(const float* vector,")
    measure_group = at(measure, "for (int g = 0; g < layout.groups; ++g) {")
    square = at(measure_group, "quad_squared_norm(const float* vector,")
    pack = at((vector,), "PackedLengths pack_vector(")
    pack_group = at(pack, "for (int g = 0; g < layout.groups; ++g) {")
    parts = [
        Part(at((vector,), "measure_centred(const float* vector,"), 0),
        Part(pack_group, GROUPS),
        Part(at(pack_group, "for (; column(i) < end; ++i) {"), CHANNELS / 4, "global store"),
        Part(at(pack, "for (; i < 4 * steps; ++i)"), (16 * STEPS - CHANNELS) / 4, "global store"),
    ]
    if measured:
        squares = at(square, "for (int d = begin + lane_index() % kPackLanes")
        parts += [Part(measure_group, GROUPS), Part(squares, CHANNELS / 4, "DFMA")]
    return Program("pack_kernel<(FragmentOrder)0>", tuple(parts), (vector,), loads=4)


def pack_rows() -> Program:
    """Eight rows."""
    return _pack(Place("pack.cuh", "void pack_row(const float* row"), True)


def pack_codes() -> Program:
    """Eight codes, measured before."""
    return _pack(Place("pack.cu", "void pack_code(const CodebookLayout& layout"), False)


def row_gradient(scale: float) -> Program:
    """Four tokens, eight lanes each; `scale` is the number of their scale, on average."""

    def at(path: Path, text: str, nth: int = 0) -> Path:
        return _at(path, "backward.cu", text, nth)

    kernel = at((), "row_gradient_kernel(const __grid_constant__")
    group = at(kernel, "for (int g = 0; g < layout.groups; ++g) {")
    channels = "for (int d = begin; named && d < end; d += kTokenLanes) {"
    parts = (
        Part(at(kernel, "while (in_image >= pyramid.first_token"), scale),
        Part(group, GROUPS),
        Part(at(group, "if (grad_rows && present && !named) {"), 0),
        Part(at(group, channels, 1), CHANNELS / 8),
        Part(at(group, channels, 2), CHANNELS / 8),
    )
    return Program("row_gradient_kernel", parts, loads=5)


def _bins(side: int, count: int) -> float:
    """Positions of a bin, on average: `area_bin` of csrc/common/geometry.h."""
    return sum(-(-(i + 1) * side // count) - i * side // count for i in range(count)) / count


def _planes(
    kernel: Path,
    channels: int,
    side: int,
    codes: Sequence[int],
    pooled: Sequence[int],
    marker: str = "STS",
) -> list[Part]:
    """Adding the codes of some scales to planes, and pooling to some, by a block of threads.

    `marker` is what an element of the codes' last step, along y, has once.
    """

    def rounds(elements: int) -> int:
        return -(-channels * elements // PLANE_THREADS)

    def at(path: Path, text: str) -> Path:
        return _at(path, "planes.cuh", text)

    add = at(kernel, "upsample_codes(const PlaneShape& shape, Extent extent,")
    pool = at(kernel, "pool(const PlaneShape& shape, Extent extent,")
    # A table is the work of the block's first warp.
    added, table = len(codes), 1 / PLANE_WARPS
    taps = _at(add, "pyramid.cuh", "i < width + height; i += kPlaneThreads) {")
    by_places = "for (int p = share.first; p < count; p += share.step) {"
    pool_x = at(pool, "i < block.count * middle; i += kPlaneThreads) {")
    pool_y = at(pool, by_places)
    across = sum(rounds(side * n) for n in pooled)
    down = sum(rounds(n * n) for n in pooled)
    sums_x = sum(rounds(side * n) * _bins(side, n) for n in pooled)
    sums_y = sum(rounds(n * n) * _bins(side, n) for n in pooled)
    sum_y = "for (int sy = bin_y.begin; sy < bin_y.end; ++sy) total"
    adding = [
        Part(add, added),
        Part(taps, added * table),
        Part(at(add, by_places), sum(rounds(n * n) for n in codes), "STS"),
        Part(at(add, "i < block.count * middle;"), sum(rounds(n * side) for n in codes), "STS"),
        Part(at(add, ALONG_Y), added * rounds(side * side), marker),
    ]
    pooling = [
        Part(pool, len(pooled)),
        Part(at(pool, "i < extent.width + extent.height;"), len(pooled) * table),
        Part(pool_x, across, "STS"),
        Part(at(pool_x, "for (int x = bin.begin; x < bin.end; ++x)"), sums_x, "FADD"),
        Part(pool_y, down, "STG"),
        Part(at(pool_y, sum_y), sums_y, "FADD"),
        Part(at(pool_y, "if (!(average - average == 0)) {"), 0),
    ]
    return (adding if codes else []) + (pooling if pooled else [])


def _whole_planes(kernel: Path, name: str, channels: int, side: int, marker: str) -> Part:
    """`load_planes` or `store_planes` of a block."""
    copy = _at(kernel, "planes.cuh", f"{name}(")
    loop = _at(copy, "planes.cuh", "i < block.count * shape.height * shape.width;")
    return Part(loop, -(-channels * side * side // PLANE_THREADS), marker)


def residual_pass(channels: int, side: int, scale: int, pooled: int) -> Program:
    """A warp of a block of a step: the codes of a scale of that side, and the next scale's rows.

    Either is 0 where there is no such scale: before the first, and after the last.
    """
    name, arguments = "step_kernel", "StepArgs"
    if not scale:
        name, arguments = "first_rows_kernel", "FirstRowsArgs"
    elif not pooled:
        name, arguments = "last_step_kernel", "LastStepArgs"
    kernel = _at((), "residual_pass.cu", f" {name}(const __grid_constant__ {arguments}")
    parts = []
    if pooled:
        parts += [_whole_planes(kernel, "load_planes", channels, side, "STS")]
    if scale:  # the row errors are summed by other blocks
        parts += [Part(_at(kernel, "residual_pass.cu", "sum_row_errors(unsigned block"), 0)]
    if scale and pooled:
        parts += [_whole_planes(kernel, "store_planes", channels, side, "STG")]
    if scale:
        name += "<(Sum)1>"
    codes, rows = [scale] if scale else [], [pooled] if pooled else []
    marker = "STS" if pooled else "STG"
    parts += _planes(kernel, channels, side, codes, rows, marker)
    return Program(name, tuple(parts), loads=4 if scale else 1)


def scalar_quantize(channels: int, side: int, scales: Sequence[int]) -> Program:
    """A warp of a block of the whole pyramid of signs, one threshold a channel."""
    kernel = _at((), "scalar.cu", "scalar_quantize_kernel(const __grid_constant__")
    parts = [
        _whole_planes(kernel, "load_planes", channels, side, "STS"),
        *_planes(kernel, channels, side, scales, scales),
    ]
    return Program("scalar_quantize_kernel", tuple(parts), loads=1 + 3 * len(scales))


def along_y(times: int) -> Program:
    """As many elements for each lane of the last step of adding codes."""
    kernel = _at((), "residual_pass.cu", " step_kernel(const __grid_constant__ StepArgs")
    add = _at(kernel, "planes.cuh", "upsample_codes(const PlaneShape& shape, Extent extent,")
    loop = _at(add, "planes.cuh", ALONG_Y)
    return Program("step_kernel<(Sum)1>", (Part(loop, times, "STS"),), loop)


#: Assumed of k = 1,200 of 32,768 codes: histograms of a search for a boundary, candidates, and how
#: many of them the lane of a warp with most lists at once.
HISTOGRAMS, CANDIDATES, CANDIDATES_LANE = 2.5, 1400, 4


def _sampler_keys(codes: float) -> tuple[Path, list[Part]]:
    """A row's first step, with guidance: aligned logits read, half keys written."""
    kernel = _at((), "sampler.cu", "sample_kernel(const __grid_constant__")
    visit = _at(kernel, "sampler.cu", "row.template visit_packs<kThreads, kUnroll>")
    packs = _at(visit, "sampler_row.cuh", "for (int begin = 0; begin < codes;")
    never = (
        _at(packs, "sampler_row.cuh", "Pack load_part(const Element* data"),
        _at(packs, "sampler_row.cuh", "combine([&](float cond, float) {"),
    )
    return packs, [Part(packs, codes / (SAMPLER_THREADS * 8)), *(Part(path, 0) for path in never)]


def _sampler_list(codes: float) -> tuple[Path, list[Part]]:
    """Looking through the half keys for candidates."""
    kernel = _at((), "sampler.cu", "sample_kernel(const __grid_constant__")
    team = _at(kernel, "sampler_team.cuh", "int list_candidates(const Row<kType>& row")
    vectors = _at(team, "sampler_team.cuh", "for (int begin = 0; begin < row.codes;")
    append = _at(vectors, "sampler_team.cuh", "void append(uint32_t hits")
    listed = _at(append, "sampler_team.cuh", "for (; hits != 0 && at < SamplerShared::kList;")
    computed = _at(team, "sampler_team.cuh", "row.template visit_packs<kThreads, 1>")
    times = codes / (SAMPLER_THREADS * 32)
    return vectors, [
        Part(vectors, times),
        Part(listed, CANDIDATES_LANE * times),
        Part(computed, 0),
    ]


def sampler_keys(codes: float) -> Program:
    """The first step alone."""
    path, parts = _sampler_keys(codes)
    return Program(SAMPLER, tuple(parts), path)


def sampler_list(codes: float) -> Program:
    """The second step alone."""
    path, parts = _sampler_list(codes)
    return Program(SAMPLER, tuple(parts[:2]), path)


def sampler(codes: int) -> Program:
    """A warp of a row's block, top-k and top-p on, the candidates in the list."""
    kernel = _at((), "sampler.cu", "sample_kernel(const __grid_constant__")
    greedy = _at(kernel, "sampler.cu", "if (greedy) {")
    found = []
    for path, times in ((kernel, HISTOGRAMS), (greedy, 0.0)):
        search = _at(path, "sampler_team.cuh", "Boundary find_boundary(Range open")
        histogram = _at(search, "sampler_team.cuh", "for (bool whole = true;; whole = false) {")
        visit = _at(histogram, "sampler_team.cuh", "void visit(Range wanted")
        listed = _at(visit, "sampler_team.cuh", "i < count; i += kThreads) {")
        others = _at(visit, "sampler_team.cuh", "begin < count; begin += kAtOnce * kThreads) {")
        # By the first warp.
        bins = _at(histogram, "sampler_team.cuh", "void search_bins(bool whole")
        found += [
            *(Part(histogram, times), Part(bins, times / (SAMPLER_THREADS / 32))),
            *(Part(listed, times * -(-CANDIDATES // SAMPLER_THREADS)), Part(others, 0)),
        ]
    parts = (*_sampler_keys(codes)[1], *_sampler_list(codes)[1], Part(greedy, 0), *found)
    return Program(SAMPLER, parts, barriers=18)
