// Several codebooks, each with an index of its own, share every launch: the same bits as one call
// for each, and as many launches as one call.
#include <algorithm>

#include "support.h"

using namespace test;
using namespace tokenflow;

namespace {

CodebookLayout with_books(CodebookLayout layout, int64_t books) {
  layout.books = books;
  return layout;
}

// Part `book` of [outer, books, inner], or back.
template <typename T>
std::vector<T> take_book(const std::vector<T>& all, int64_t books, int64_t inner, int64_t book) {
  std::vector<T> part;
  for (size_t first = book * inner; first < all.size(); first += books * inner) {
    part.insert(part.end(), all.begin() + first, all.begin() + first + inner);
  }
  return part;
}

int64_t nearest(const CodebookLayout& layout, const Floats& codebook, const Floats& rows,
                Indices* indices) {
  NearestCodeArgs<float> args = {};
  args.layout = layout;
  args.codebook = codebook.data();
  args.num_rows = static_cast<int64_t>(rows.size()) / layout.dim / layout.books;
  args.rows = rows.data();
  *indices = poisoned<int64_t>(args.num_rows * layout.books);
  args.indices = indices->data();
  const int64_t launches = emulation::launches();
  CHECK(run(args, cuda::nearest_code_workspace_bytes, cuda::launch_nearest_code) == cudaSuccess,
        "launch");
  return emulation::launches() - launches;
}

void check_search(const char* name, int64_t books, const CodebookLayout& one, int64_t num_rows) {
  const int64_t of_codes = one.codes * one.dim, of_rows = num_rows * one.dim;
  Floats codebook = random_floats(books * of_codes, 1), rows = random_floats(books * of_rows, 2);
  // The codebooks' magnitudes are far apart, and the last one is not finite.
  for (int64_t i = 0; i < of_codes; ++i) codebook[i] *= 1e6f;
  codebook.back() = std::numeric_limits<float>::quiet_NaN();
  const auto compare = [&](const char* order) {
    Indices all, single;
    const int64_t launches = nearest(with_books(one, books), codebook, rows, &all);
    for (int64_t book = 0; book < books; ++book) {
      const int64_t alone = nearest(one, take_book(codebook, books, of_codes, book),
                                    take_book(rows, books, of_rows, book), &single);
      CHECK(take_book(all, books, num_rows, book) == single, "%s (%s): codebook %ld", name, order,
            static_cast<long>(book));
      CHECK(launches == alone, "%s: %ld launches, %ld for one codebook", name,
            static_cast<long>(launches), static_cast<long>(alone));
    }
  };
  if (num_rows > 1000) {
    compare("forward");
  } else {
    in_every_order(compare);
  }
}

struct Results {
  Floats quantized, squared_error, rows, decoded, grad_h, grad_codebook, atomic_gradient;
  Indices indices, hits;
};

// Everything that a call with `books` codebooks computes.
Results pyramid(const Pyramid& pyramid, const CodebookLayout& layout, const Floats& codebook,
                const Floats& h, const Floats& grad_quantized, const Floats& grad_error,
                int64_t dropped) {
  const int64_t tokens = pyramid.batch * tokens_per_image(pyramid);
  const int64_t means = layout.books * pyramid.num_scales;
  Results out;
  out.quantized = poisoned<float>(static_cast<int64_t>(h.size()));
  out.squared_error = poisoned<float>(means);
  out.indices = poisoned<int64_t>(tokens);
  out.hits = poisoned<int64_t>(all_codes(layout));
  QuantizeArgs<float> quantize = {pyramid,
                                  layout,
                                  codebook.data(),
                                  h.data(),
                                  &dropped,
                                  out.quantized.data(),
                                  out.indices.data(),
                                  out.squared_error.data(),
                                  out.hits.data()};
  const int64_t launches = emulation::launches();
  CHECK(run(quantize, cuda::quantize_workspace_bytes, cuda::launch_quantize) == cudaSuccess,
        "quantize");
  CHECK(emulation::launches() - launches == 5 + 4 * pyramid.num_scales, "%ld launches",
        static_cast<long>(emulation::launches() - launches));
  out.rows = poisoned<float>(tokens * layout.dim);
  const PyramidRowsArgs<float> rows = {
      pyramid, layout, codebook.data(), h.data(), out.indices.data(), out.rows.data()};
  CHECK(run(rows, cuda::pyramid_rows_workspace_bytes, cuda::launch_pyramid_rows) == cudaSuccess,
        "rows");
  out.decoded = poisoned<float>(static_cast<int64_t>(h.size()));
  const DecodeArgs<float> decode = {pyramid, layout, codebook.data(), out.indices.data(),
                                    out.decoded.data()};
  CHECK(run(decode, cuda::decode_workspace_bytes, cuda::launch_decode) == cudaSuccess, "decode");
  for (const bool atomic : {false, true}) {
    Floats& grad_codebook = atomic ? out.atomic_gradient : out.grad_codebook;
    out.grad_h = poisoned<float>(static_cast<int64_t>(h.size()));
    grad_codebook = poisoned<float>(all_codes(layout) * layout.dim);
    const QuantizeBackwardArgs<float> backward = {pyramid,
                                                  layout,
                                                  codebook.data(),
                                                  h.data(),
                                                  out.indices.data(),
                                                  grad_quantized.data(),
                                                  grad_error.data(),
                                                  grad_error.data() + means,
                                                  out.grad_h.data(),
                                                  grad_codebook.data(),
                                                  atomic};
    CHECK(run(backward, cuda::quantize_backward_workspace_bytes, cuda::launch_quantize_backward) ==
              cudaSuccess,
          "backward");
  }
  return out;
}

void check_pyramid(const char* name, int64_t books, const CodebookLayout& one, const Pyramid& maps,
                   int64_t dropped = -1) {
  const int64_t images = maps.batch, tokens = tokens_per_image(maps);
  const int64_t plane = static_cast<int64_t>(one.dim) * maps.height * maps.width;
  const int64_t scales = maps.num_scales;
  Pyramid all_maps = maps;
  all_maps.batch *= books;
  Floats codebook = random_floats(books * one.codes * one.dim, 11);
  for (int64_t i = 0; i < one.codes * one.dim; ++i) codebook[i] *= 100;
  const Floats h = random_floats(images * books * plane, 12);
  const Floats grad = random_floats(images * books * plane, 13);
  const Floats errors = random_floats(2 * books * scales, 14, 100);
  in_every_order([&](const char* order) {
    const Results all =
        pyramid(all_maps, with_books(one, books), codebook, h, grad, errors, dropped);
    for (int64_t book = 0; book < books; ++book) {
      Floats error = take_book(errors, books, scales, book);  // of codes, then of rows
      const Results alone = pyramid(
          maps, one, take_book(codebook, books, one.codes * one.dim, book),
          take_book(h, books, plane, book), take_book(grad, books, plane, book), error, dropped);
      const auto same = [&](const auto& part, int64_t inner, const auto& wanted, const char* what) {
        CHECK(same_bits(take_book(part, books, inner, book), wanted), "%s (%s): %s of codebook %ld",
              name, order, what, static_cast<long>(book));
      };
      same(all.quantized, plane, alone.quantized, "quantized");
      same(all.indices, tokens, alone.indices, "indices");
      same(all.squared_error, scales, alone.squared_error, "error");
      same(all.hits, one.codes, alone.hits, "hits");
      same(all.rows, tokens * one.dim, alone.rows, "rows");
      same(all.decoded, plane, alone.decoded, "decode");
      same(all.grad_h, plane, alone.grad_h, "grad_h");
      same(all.grad_codebook, one.codes * one.dim, alone.grad_codebook, "grad_codebook");
      const Floats got = take_book(all.atomic_gradient, books, one.codes * one.dim, book);
      check_close(got, Vector(alone.atomic_gradient.begin(), alone.atomic_gradient.end()), 1e-5,
                  "gradient by atomics");
    }
  });
}

}  // namespace

int main() {
  check_search("UniTok's", 4, make_layout(130, {8}, true), 20);
  check_search("not normalised", 2, make_layout(300, {5, 2}, false, {1.0, 0.5}), 10);
  CodebookLayout dot = make_layout(130, {90}, false);
  dot.metric = Metric::kDot;
  check_search("wide, inner product", 2, dot, 9);
  check_search("many rows", 2, make_layout(3, {2}, true), 16390);

  check_pyramid("one scale", 3, make_layout(33, {5}, true), make_pyramid(2, 3, 3, {{3, 3}}));
  check_pyramid("depth", 2, make_layout(20, {6}, false),
                make_pyramid(2, 2, 3, {{2, 3}, {2, 3}, {2, 3}}));
  check_pyramid("scales", 2, make_layout(140, {3, 2}, true, {1.0, 0.5}),
                make_pyramid(1, 3, 4, {{1, 2}, {3, 2}, {3, 4}}));
  check_pyramid("a scale dropped", 2, make_layout(9, {4}, true),
                make_pyramid(2, 2, 2, {{1, 1}, {2, 2}}), 1);
  return 0;
}
