"use strict";
// One page over /api: browse, an item with its neighbours, a picture with its neighbours. The address holds what is shown.

const $ = (id) => document.getElementById(id);
const PAGE = 48;
let shop = { pools: [], fields: [], values: {} };
let turn = 0; // the newest request of a view; older answers are dropped
let timer = 0; // a browse that waits for more typing; any other view cancels it
let picture = null; // the file whose neighbours are shown

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function ask(path, options) {
  const answer = await fetch(path, options);
  let body;
  try { body = await answer.json(); } catch { body = {}; }
  if (!answer.ok) {
    const detail = typeof body.detail === "string" ? body.detail : Array.isArray(body.detail) ? body.detail.map((d) => d.msg).join("; ") : "";
    throw new Error(body.error || detail || `the server answered ${answer.status}`);
  }
  return body;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

const query = (pairs) => new URLSearchParams(pairs.filter(([, value]) => value !== null && value !== "")).toString();
const link = (id) => "#" + query([["item", id], ["pool", $("pool-a").value], ["beside", $("pool-b").value]]);
const shot = (item, side) => item.picture
  ? el("img", { class: "shot", src: `api/picture?${query([["id", item.id], ["side", side]])}`, alt: "", loading: "lazy", width: side, height: side })
  : el("div", { class: "shot none" }, "no picture");
const price = (value) => value === null || value === undefined ? null : value.toLocaleString(undefined, { maximumFractionDigits: 2 });

function card(item, same) {
  const facts = [item.brand, item.category, price(item.price)].filter(Boolean).join(" · ");
  const score = item.score === undefined ? null : `${item.rank}. ${item.score.toFixed(4)}`;
  return el("a", { class: same ? "card same" : "card", href: link(item.id), title: same ? "same group as the query" : null },
    shot(item, 320), el("p", {}, item.title || item.id), facts ? el("p", {}, facts) : null, el("p", {}, score || item.id));
}

function fieldValues() {
  return [...document.querySelectorAll("#fields input")].filter((input) => input.value.trim())
    .map((input) => [input.name, input.value.trim()]);
}

async function browse(offset = 0) {
  const mine = ++turn;
  $("focus").hidden = true;
  say("Loading …");
  const pairs = [["text", $("text").value], ["offset", offset], ["limit", PAGE], ...fieldValues().map(([n, v]) => ["where", `${n}=${v}`])];
  try {
    const found = await ask(`api/items?${query(pairs)}`);
    if (mine !== turn) return;
    const grid = offset ? $("results").querySelector(".grid") : el("div", { class: "grid" });
    grid.append(...found.items.map((item) => card(item)));
    if (!offset) $("results").replaceChildren(grid);
    const shown = offset + found.items.length;
    say(found.total ? `${shown.toLocaleString()} of ${found.total.toLocaleString()} items` : "No item matches.");
    $("more").hidden = shown >= found.total;
    $("more").onclick = () => browse(shown);
  } catch (error) { if (mine === turn) say(`Not loaded: ${error.message}`, true); }
}

function chosenPools() {
  const pools = [$("pool-a").value];
  if ($("pool-b").value && $("pool-b").value !== pools[0]) pools.push($("pool-b").value);
  return pools;
}

function neighbours(sides, group) {
  const two = sides.length > 1;
  const common = two ? new Set(sides[0].hits.map((h) => h.id).filter((id) => sides[1].hits.some((h) => h.id === id))) : new Set();
  const columns = sides.map((side) => el("div", {},
    el("h3", {}, two ? `${side.pool}: ${side.hits.length} neighbours, ${common.size} in both` : `${side.hits.length} nearest neighbours`),
    el("div", { class: "grid" }, ...side.hits.map((hit) => card(hit, group && hit.group_id === group)))));
  $("results").replaceChildren(el("div", { class: two ? "sides two" : "sides" }, ...columns));
  $("more").hidden = true;
}

async function showItem(id) {
  const mine = ++turn;
  say("Loading …");
  try {
    const item = await ask(`api/item?${query([["id", id]])}`);
    const sides = await Promise.all(chosenPools().map((pool) => ask(`api/neighbours?${query([["id", id], ["pool", pool], ["k", 24]])}`)));
    if (mine !== turn) return;
    const facts = [["id", item.id], ["brand", item.brand], ["category", item.category], ["price", price(item.price)], ["group", item.group_id],
      ...Object.entries(item.attributes || {})].filter(([, value]) => value);
    const maps = el("div", { class: "maps" });
    $("focus").replaceChildren(el("div", { class: "about" }, shot(item, 640),
      el("div", {}, el("h2", {}, item.title || item.id), el("dl", {}, ...facts.flatMap(([n, v]) => [el("dt", {}, n), el("dd", {}, v)])), maps)));
    $("focus").hidden = false;
    neighbours(sides, item.group_id);
    say("");
    document.title = item.title || item.id;
    window.scrollTo({ top: 0 });
    explain(id, maps, mine);
  } catch (error) { if (mine === turn) { $("focus").hidden = true; $("results").replaceChildren(); say(`Not loaded: ${error.message}`, true); } }
}

async function explain(id, place, mine) {
  const pool = shop.pools.find((p) => p.name === $("pool-a").value);
  if (!pool || !pool.pictures) return;
  try {
    const told = await ask(`api/explain?${query([["id", id], ["pool", pool.name]])}`);
    if (mine !== turn) return;
    for (const [name, words] of [["anchored", "Metadata-anchored queries"], ["exploratory", "Exploratory queries"]]) {
      if (!told[name]) continue;
      const gate = told[`${name}_gate`];
      place.append(el("figure", {}, el("img", { src: told[name], alt: `${words}: where they look` }),
        el("figcaption", {}, gate === null || gate === undefined ? words : `${words}, gate ${gate >= 0 ? "+" : ""}${gate.toFixed(2)}`)));
    }
    if (told.close_up) {
      place.append(el("figure", {}, el("img", { src: told.close_up, alt: "The part that is looked at again" }), el("figcaption", {}, "Looked at again, enlarged")));
    }
    if (!place.children.length && told.reason) place.append(el("p", {}, told.reason));
  } catch (error) { place.append(el("p", {}, `No attention maps: ${error.message}`)); }
}

async function searchPicture(file) {
  const mine = ++turn;
  clearTimeout(timer);
  picture = file;
  if (location.hash) history.pushState(null, "", location.pathname);
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
  $("focus").hidden = true;
  say("Searching …");
  try {
    const pools = chosenPools().filter((name) => shop.pools.find((p) => p.name === name).pictures);
    if (!pools.length) throw new Error("the chosen pool has no run to embed a picture with");
    const sides = await Promise.all(pools.map((pool) => ask(
      `api/search?${query([["pool", pool], ["k", 24], ...fieldValues().map(([n, v]) => ["field", `${n}=${v}`])])}`,
      { method: "POST", body: file, headers: { "Content-Type": file.type || "application/octet-stream" } })));
    if (mine !== turn) return;
    neighbours(sides, null);
    say("Neighbours of your picture");
    $("results").focus();
  } catch (error) { if (mine === turn) say(`Not searched: ${error.message}`, true); }
}

function route() {
  picture = null;
  const state = new URLSearchParams(location.hash.slice(1));
  for (const [id, name] of [["pool-a", "pool"], ["pool-b", "beside"]]) {
    const value = state.get(name);
    if (value && shop.pools.some((p) => p.name === value)) $(id).value = value;
  }
  document.title = "Catalogue neighbours";
  if (state.get("item")) showItem(state.get("item"));
  else browse();
}

async function start() {
  try { shop = await ask("api/shop"); } catch (error) { say(`The server does not answer: ${error.message}`, true); return; }
  $("pool-a").append(...shop.pools.map((p) => el("option", { value: p.name }, `${p.name} (${p.items.toLocaleString()})`)));
  $("pool-b").append(el("option", { value: "" }, "none"), ...shop.pools.map((p) => el("option", { value: p.name }, p.name)));
  $("pool-a-label").hidden = shop.pools.length < 2;
  $("pool-b-label").hidden = shop.pools.length < 2;
  $("fields").append(...shop.fields.flatMap((name, i) => [el("label", {}, name, el("input", { name, list: `values-${i}`, maxlength: 500 })),
    el("datalist", { id: `values-${i}` }, ...(shop.values[name] || []).map((value) => el("option", { value })))]));
  const pictures = shop.pools.some((p) => p.pictures);
  $("drop").hidden = !pictures;
  $("filters").hidden = !pictures && !shop.fields.length;

  const later = () => { clearTimeout(timer); timer = setTimeout(() => { if (location.hash) location.hash = ""; else route(); }, 200); };
  $("text").addEventListener("input", later);
  $("fields").addEventListener("change", () => { if (picture) searchPicture(picture); else later(); });
  $("browse").addEventListener("submit", (event) => { event.preventDefault(); later(); });
  for (const id of ["pool-a", "pool-b"]) $(id).addEventListener("change", () => {
    const state = new URLSearchParams(location.hash.slice(1));
    if (state.get("item")) location.hash = link(state.get("item"));
  });
  $("file").addEventListener("change", (event) => { if (event.target.files[0]) searchPicture(event.target.files[0]); event.target.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "dragover") $("filters").open = true;
    if (kind === "drop" && event.dataTransfer.files[0]) searchPicture(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => { const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/")); if (file) searchPicture(file); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("text").focus(); }
    if (event.key === "Escape") { if (document.activeElement !== document.body) document.activeElement.blur(); else if (location.hash) location.hash = ""; }
  });
  window.addEventListener("hashchange", route);
  route();
}

document.addEventListener("DOMContentLoaded", start);
