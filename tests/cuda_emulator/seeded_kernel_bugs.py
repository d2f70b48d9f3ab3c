"""The list of kernel_bugs.py: mistakes that somebody could make in the CUDA kernels.

`text` occurs once in `file` (below csrc/kernels); what stands in « » there, an expression or whole statements, is
replaced by `mistake`. `report` is what the kernel's test then sees first: a report of the emulator, or `result`.
Statements end with a semicolon; the mistake '' takes them away. `kernel` is the source to compile, without `_cuda.cu`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bug:
    kernel: str
    file: str
    text: str
    mistake: str
    report: str
    why: str


def of(kernel: str, file: str, *bugs: tuple[str, str, str, str]) -> list[Bug]:
    return [Bug(kernel, file, *bug) for bug in bugs]


BUGS = [
    *of(
        "bitmap_matmul",
        "bitmap_matmul/bitmap_matmul_cuda.cu",
        ("«__syncwarp();»\n  return __shfl_sync(kWholeWarp, until", "", "race", "columns are read as they are listed"),
        ("if («i < first») before += set;", "i <= first", "bounds", "counts the values of the first word as before it"),
        ("bits_of_last != 0 && bits[words - 1] >> «bits_of_last» != 0", "0", "result", "full last words are damage"),
    ),
    *of(
        "bitmap_rows",
        "bitmap_matmul/bitmap_rows_cuda.cu",
        ("std::int32_t* next = to + «through - own»;", "through", "bounds", "begins behind the lane's own bits"),
        ("«WarpSum(count) != end - begin») return;", "false", "race", "a row with other bits than offsets is listed"),
        ("«begin < 0» || end < begin", "false", "bounds", "a row of right length that begins before the values"),
    ),
    *of(
        "bitmap_tiles",
        "bitmap_matmul/bitmap_tiles_cuda.cu",
        ("«WaitForCopies<kStages - 2>();»\n      __syncthreads();", "", "asynchronous", "reads x that is being copied"),
        ("  «WaitForPrevious();»", "", "asynchronous", "reads x that the kernel before is packing"),
        ("n * a.weight.rows + r, «a.relu && y < 0» ?", "a.relu && !(y >= 0)", "result", "relu makes a NaN 0"),
    ),
    *of(
        "bitplane_matmul",
        "bitplane_matmul/bitplane_matmul_cuda.cu",
        ("c / i.kernel_width % «i.kernel_height»", "i.kernel_width", "result", "takes the other side of the kernel"),
        ("«row < 0 || row >= i.height» ||", "row >= i.height", "bounds", "reads the row above the image"),
        (
            "tile % 2 == 0 && «(tile + 1) * kXnorRows >= a.rows»",
            "false",
            "result",
            "half of the last word stays unwritten",
        ),
    ),
    *of(
        "blocked_matmul",
        "blocked_matmul/blocked_matmul_cuda.cu",
        ("if («lane >= distance») after += before;", "lane > distance", "result", "a prefix sum leaves lanes out"),
        (
            "«__syncthreads();»\n      for (int other = 0;",
            "",
            "uninitialised",
            "the warps' counts are read as they are written",
        ),
        ("bad = «atomicExch(&memory.seen_in[row], turn)» == turn;", "0u", "race", "a row that is named twice"),
        ("a.sample_scales[first + «s»]", "0", "result", "the scale of the tile's first sample for all"),
        ("«if (damaged) sum = DamagedWeight();»\n      y[", "", "result", "damage leaves a sum"),
        ("if («largest_bits >= 0x7f800000u») return", "largest_bits > 0x7f800000u", "result", "an infinite sample"),
    ),
    *of(
        "codebook_conv2d",
        "codebook_conv2d/codebook_conv2d_cuda.cu",
        (
            "const bool wrong = «found.code >= w.entries»;",
            "found.code > w.entries",
            "bounds",
            "the first code too many",
        ),
        ("FromFloat<Float>(«a.relu && number < 0 ? 0.0f : number»);", "number", "result", "no relu"),
    ),
    *of(
        "codebook_embedding",
        "codebook_embedding/codebook_embedding_cuda.cu",
        ("bool damaged = «r < 0 || r >= w.rows»;", "r < 0 || r > w.rows", "bounds", "the row behind the last"),
        ("|| «r == a.padding» ||", "false", "result", "the padding takes part in sums"),
    ),
    *of(
        "codebook_few",
        "codebook_matmul/codebook_few.cuh",
        ("«__syncthreads();  // nobody reads the table any more»", "", "race", "sums over the table in use"),
        (
            "const bool high_inside = n < a.samples && «c + 16 < a.weight.columns»;",
            "c < a.weight.columns",
            "bounds",
            "the half past the last column",
        ),
        ("sum += __shfl_xor_sync(kWholeWarp, sum, «1»);", "4", "result", "adds another row's lane"),
    ),
    *of(
        "codebook_tiles",
        "codebook_matmul/codebook_tiles.cuh",
        (
            "«__syncthreads();  // the table is there, and the samples before are done»",
            "",
            "uninitialised",
            "a table half filled",
        ),
        (
            "MultiplyFragments(sums[pair][group], {«low[0]», high[0], low[1], high[1]}",
            "low[1]",
            "result",
            "a fragment's words out of order",
        ),
        ("«WaitForCopies<kStages - 2>();»", "", "asynchronous", "reads a stage that is being copied"),
    ),
    *of(
        "codebook_matmul",
        "codebook_matmul/codebook_matmul_cuda.cu",
        (
            "«__syncthreads();»\n  for (int k = warp; k < w.entries; k += Tile::kWarps) {",
            "",
            "uninitialised",
            "other warps' sums are added before they are complete",
        ),
        ("for (std::int64_t part = lane; «part < a.parts»;", "part + 1 < a.parts", "result", "the last part is lost"),
    ),
    *of(
        "csr_matmul",
        "csr_matmul/csr_matmul_cuda.cu",
        (
            "«atomicAdd(sums + s * w.columns + column, value * grads[s]);»",
            "sums[s * w.columns + column] += value * grads[s];",
            "race",
            "rows add to one column without atomics",
        ),
        ("if (a.bias != nullptr) sum += a.bias[«r»];", "(first + lane) % w.rows", "result", "the bias of another row"),
        ("FromFloat<Float>(«a.relu && sum < 0 ? 0.0f : sum»);", "sum", "result", "no relu"),
        ("a.relu && «sum < 0» ? 0.0f : sum);", "!(sum >= 0)", "result", "relu makes a NaN 0"),
        ("at = «first / Tile::kSamples * w.columns» +", "0", "result", "the first samples' panel for all"),
    ),
    *of(
        "csr_matmul",
        "csr_matmul/csr_weight.cuh",
        ("column < 0 || «column >= w.columns»", "column > w.columns", "bounds", "the column behind the last"),
        ("|| «end > w.nnz») return", "false", "bounds", "an offset behind the last non-zero"),
    ),
    *of(
        "csr_matmul",
        "common/cuda.cuh",
        ("if («c >= columns») return;", "c > columns", "bounds", "packs a column too many"),
        ("«n < samples» ? x[n * columns + c]", "true", "bounds", "packs samples past the last"),
        (
            "«if (value != value) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};»",
            "",
            "result",
            "a NaN with low bits set rounds to infinity",
        ),
        ("(bits + 0x7fff + «(bits >> 16 & 1)») >> 16)", "1", "result", "ties away from even"),
    ),
    *of(
        "fixed_matmul",
        "fixed_matmul/fixed_matmul_cuda.cu",
        (
            "«__syncthreads();»\n    const int s = thread / kPanelRows, of_panel",
            "",
            "race",
            "the warps' sums too early",
        ),
        ("low(«x >> 16»)) * low(", "x", "result", "the first number of a word for the second"),
        ("«begin == 0» ? sum : of_warp + sum;", "true", "result", "only the last chunk counts"),
    ),
    *of(
        "fixed_round",
        "fixed_round/fixed_round_cuda.cu",
        ("(«s - floor >= 0.5f» ? 1 : 0)", "s - floor > 0.5f", "result", "ties go down"),
        ("fmaxf(x * scale, «-highest - 1»)", "-highest", "result", "no lowest number"),
        ("«i + 1 < size») {", "i < size", "bounds", "the second of a pair behind the end"),
        ("const std::uint32_t word = words.word[«v / 2 * 2 + l»]", "v / 2 + 2 * l", "result", "another stream's bits"),
        (
            "(«rest + static_cast<int>(random)») >> 16",
            "rest + static_cast<int>(random) + 1",
            "result",
            "stochastic rounding a step of 2^-16 off",
        ),
    ),
    *of(
        "fixed_matmul",
        "common/philox.h",
        ("v % 2 == 0 ? «word & 0xffff» : word >> 16", "word >> 16", "result", "half of the random bits twice"),
    ),
    *of(
        "flat_conv2d",
        "flat_conv2d/flat_conv2d_cuda.cu",
        (
            "for (std::int64_t from = 0; from < s.in_channels; from += Tile::kChannels) {\n    «__syncthreads();»",
            "",
            "race",
            "refills tiles that others still multiply",
        ),
        (
            "«static_cast<std::uint64_t>(left + k) >= static_cast<std::uint64_t>(s.width)») continue;",
            "left + k >= s.width",
            "bounds",
            "reads columns left of the image",
        ),
        ("a.relu && «sum < 0» ?", "!(sum >= 0)", "result", "relu makes a NaN 0"),
    ),
    *of(
        "product_matmul",
        "product_matmul/product_matmul_cuda.cu",
        (
            "MakeWords<Tile, Words>(a, static_cast<int>(first_unit) * Tile::kUnit, pairs, n, memory.words);\n"
            "  «__syncthreads();»",
            "",
            "uninitialised",
            "looks up in tables that are being made",
        ),
        (
            "const bool damaged = entry >= a.weight.entries && «table < Tables(a.weight)»;",
            "false",
            "result",
            "codes past the entries look 0 up",
        ),
        ("if (a.bias != nullptr) y += a.bias[«r»];", "0", "result", "the first row's bias for all"),
    ),
    *of(
        "sign_matmul",
        "sign_matmul/sign_matmul_cuda.cu",
        ("«if (r >= a.rows) return;»", "", "bounds", "no guard for the rows of the last tile"),
        ("fmaf(dot, scale, «bias»)", "0.0f", "result", "no bias"),
        ("a.relu && «y < 0» ?", "!(y >= 0)", "result", "relu makes a NaN 0"),
    ),
    *of(
        "sign_matmul",
        "common/sign_tables.cuh",
        (
            "bits[k][1] = static_cast<std::uint32_t>(«of_row >> 32»);\n      }\n      __syncthreads();",
            "of_row",
            "result",
            "the low half of a word twice",
        ),
        ("pair(0, entry & 3) + pair(2, «entry >> 2»)", "entry & 3", "result", "signs of the other pair"),
        (
            "        }\n        memory.tables[s][threadIdx.x].Make(x);\n      }\n      «__syncthreads();»",
            "",
            "uninitialised",
            "adds from tables that are being made",
        ),
    ),
    *of(
        "sign_max_pool2d",
        "sign_max_pool2d/sign_max_pool2d_cuda.cu",
        ("«if (row < 0 || row >= a.height) continue;»", "", "bounds", "rows outside the image"),
        ("kw * «a.dilation_w»;", "1", "result", "no dilation across"),
        ("pixel % «a.out_width»", "a.out_height", "result", "the other side of the image"),
    ),
    *of(
        "sign_pack",
        "sign_pack/sign_pack_cuda.cu",
        ("const bool low = c < a.columns && «!(ToFloat(x[c]) >= 0)»;", "ToFloat(x[c]) < 0", "result", "NaN as +1"),
        ("«c + kWarpSize < a.columns» &&", "c < a.columns", "bounds", "columns of the upper half past the last"),
    ),
    *of(
        "sparse_conv2d",
        "sparse_conv2d/sparse_conv2d_cuda.cu",
        ("«if (row.damaged) damaged = 1u << lane;»", "", "result", "damaged offsets leave a filter of zeros"),
    ),
    *of(
        "sparse_conv2d",
        "sparse_conv2d/conv_numbers.cuh",
        ("«damaged = true;»", "", "result", "a code without an entry is 0"),
    ),
    *of(
        "conv_fragments",
        "sparse_conv2d/conv_fragments_cuda.cu",
        ("(k > from && «ColumnAt(a.weight, k - 1) >= column»)", "false", "race", "a column that is named twice"),
        ("if («whole != whole») sum", "false", "result", "zeros times infinity"),
        ("«if (inside || item >= stage_units) continue;»", "continue;", "uninitialised", "no zeros around the image"),
        (
            "WaitForCopies<0>();\n    «__syncthreads();»  // all have",
            "",
            "race",
            "reads what other threads are still copying",
        ),
        ("column = 0, tap_of_row += «down»", "across", "result", "rows of taps follow each other"),
    ),
    *of(
        "xnor_conv2d",
        "xnor_conv2d/xnor_conv2d_cuda.cu",
        ("«atomicOr(y, bits << shift);»", "*y |= bits << shift;", "race", "groups share words without atomics"),
        (
            "«taps[m]» * static_cast<int>(a.channels)",
            "static_cast<int>(a.kernel_h * a.kernel_w)",
            "result",
            "counts taps outside the image",
        ),
        (
            "«WaitForCopies<kAhead - 1>();»\n    __syncthreads();",
            "",
            "asynchronous",
            "reads a stage that is being copied",
        ),
    ),
    *of(
        "xnor_matmul",
        "xnor_matmul/xnor_matmul_cuda.cu",
        (
            "counts.of_warp[warp][s][lane] = counters[s].Count();\n    «__syncthreads();»",
            "",
            "uninitialised",
            "the warps' counts too early",
        ),
        ("of_x[f][i] + of_w[p][i] - «2» * both[f][p][i]", "1", "result", "bits in common counted once"),
        (
            "within && «dot < a.thresholds[r]»);\n    if (lane == 0) StoreSigns",
            "dot <= a.thresholds[r]",
            "result",
            "a sum at the threshold has the other sign",
        ),
        ("«signs |= __shfl_xor_sync(kWholeWarp, signs, 2);»", "", "result", "signs of half of the lanes are lost"),
        ("«WaitForCopies<kAhead - 1>();»\n", "", "asynchronous", "reads a stage that is being copied"),
    ),
]

# Those whose copies compile and run within a few seconds; the others are left to make test-full.
QUICK = (
    "bitmap_rows", "bitplane_matmul", "codebook_conv2d", "codebook_embedding", "fixed_round", "flat_conv2d",
    "sign_matmul", "sign_max_pool2d", "sign_pack", "xnor_conv2d", "xnor_matmul",
)  # fmt: skip
