// The shop's page. It asks only the address that it came from, and everything that it shows goes in as text, never as HTML.
import {picture} from "./pictures.js";
import {WORDS} from "./words.js";

const SIZE = 24;
const FACETS = ["category", "brand", "price", "rating"];
const SORTS = ["", "price", "-price", "-rating", "-listed_ts"];
const DONE = {click: "viewed", cart: "carted", purchase: "bought"};
const at = id => document.getElementById(id);
const state = {query: "", user: "", sort: "", offset: 0, filters: {}, like: null, page: null};
let language = sessionStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");

const say = (name, facts = {}) => WORDS[language][name].replace(/\{(\w+)\}/g, (_, key) => facts[key] ?? "");

function make(tag, facts = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside.filter(one => one !== null && one !== ""));
  return made;
}

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
}

function session() {
  const there = sessionStorage.getItem("session") || random();
  sessionStorage.setItem("session", there);
  return there;
}

const device = () => matchMedia("(max-width: 45rem)").matches ? "phone" : "desktop";

// Asking

class No extends Error {}

async function ask(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, {method: body === undefined ? "GET" : "POST", headers, signal, body: body && JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new No(say("gone"));
  }
  if (answer.status === 401) {
    if (!at("door").open) at("door").showModal();
    throw new No(key ? say("key_wrong") : "");
  }
  const said = await answer.json().catch(error => {
    if (error.name === "AbortError") throw error;
    return {error: String(answer.status)};
  });
  if (!answer.ok) throw new No(said.field ? `${said.field}: ${said.error}` : said.error);
  return said;
}

let running = new AbortController();

async function refresh({focus = false, before = null} = {}) {
  running.abort();
  const mine = running = new AbortController();
  const body = {k: SIZE, offset: state.offset, sort: state.sort || null, facets: FACETS, explain: true, language, device: device(), session_id: session(), user_id: state.user || null, filters: wanted()};
  const [path, more] = state.like ? ["similar", {item_id: state.like.item_id}] : state.query ? ["search", {query: state.query}] : ["recommend", {}];
  at("cards").classList.add("waiting");
  try {
    state.page = await ask(path, {...body, ...more}, mine.signal);
    at("wrong").textContent = "";
    show(before);
    if (focus) { at("results").focus(); scrollTo(0, 0); }
  } catch (error) {
    if (error.name === "AbortError") return false;
    if (!(error instanceof No)) throw error;
    at("wrong").textContent = error.message;
  } finally {
    if (mine === running) at("cards").classList.remove("waiting");
  }
  return true;
}

function wanted() {
  const filters = {};
  for (const [name, values] of Object.entries(state.filters)) {
    const parts = [...values.values()];
    if (!parts.length) continue;
    const ranges = parts.filter(value => typeof value === "object");
    filters[name] = ranges.length ? {low: Math.min(...ranges.map(value => value.low)), high: Math.max(...ranges.map(value => value.high))} : parts;
  }
  return filters;
}

async function happened(kind, item) {
  const event = {event_id: random(), kind, item_id: item.item_id, position: item.position, price: item.price, request_id: state.page.request_id, user_id: state.user || null, session_id: session(), device: device()};
  event.surface = state.like ? "similar" : state.query ? "search" : "home";
  if (event.surface === "search") event.query = state.query;
  if (kind === "purchase") event.quantity = 1;
  try {
    await ask("events", [event]);
  } catch (error) {
    if (!(error instanceof No)) throw error;
    at("wrong").textContent = error.message;
    return;
  }
  const before = new Map(state.page.items.map(one => [one.item_id, one.position]));
  const held = document.activeElement?.id;
  if (!await refresh({before})) return;
  const changed = state.page.items.filter(one => before.get(one.item_id) !== one.position).length;
  at("noted").textContent = `${say(DONE[kind], {title: item.title})} ${say(changed ? "changed" : "same", {n: changed})}`;
  if (held) at(held)?.focus({preventScroll: true});
}

// Showing

const price = (value, currency) => {
  try {
    return new Intl.NumberFormat(language, {style: "currency", currency}).format(value);
  } catch {
    return new Intl.NumberFormat(language, {maximumFractionDigits: 2}).format(value);
  }
};

function show(before) {
  const {page} = state, n = page.total;
  at("title").textContent = state.like ? say("like", {title: state.like.title}) : state.query ? say("results", {query: state.query}) : say(state.user ? "for_you" : "for_all");
  document.title = `${at("title").textContent} · ${say("shop")}`;
  at("count").textContent = [say(n === 1 ? "one" : "many", {n}), state.query || state.like ? page.note : ""].filter(Boolean).join(" · ");
  at("noted").textContent = "";
  at("cards").replaceChildren(...page.items.map(item => make("li", {}, card(item, before))));
  at("cards").start = state.offset + 1;
  at("pages").hidden = n <= SIZE;
  at("before").disabled = !state.offset;
  at("after").disabled = state.offset + SIZE >= n;
  at("where").textContent = say("where", {page: 1 + state.offset / SIZE, pages: Math.ceil(n / SIZE)});
  showFacets();
}

function card(item, before) {
  const name = `i-${item.position}`;
  const button = (kind, word) => make("button", {type: "button", id: `${kind}-${item.item_id}`, className: kind === "purchase" ? "" : "plain", onclick: () => happened(kind, item)}, say(word), make("span", {className: "unseen"}, `: ${item.title}`));
  const reasons = [...new Set((item.reasons || []).map(why => why.text).filter(Boolean))].slice(0, 3);
  const kind = [item.brand, item.category?.split(">").pop().trim()].filter(Boolean).join(" · ");
  return make("article", {className: "card", "aria-labelledby": name},
    moved(item, before),
    make("div", {className: "picture"}, image(item)),
    make("div", {className: "about"},
      make("h2", {id: name}, item.title),
      kind && make("p", {className: "kind"}, kind),
      item.rating === null ? null : stars(item),
      item.price === null ? null : make("p", {className: "price"}, price(item.price, item.currency)),
      item.variants > 1 ? make("p", {className: "variants"}, say("variants", {n: item.variants})) : null,
      item.in_stock === false ? make("p", {className: "variants"}, say("sold_out")) : null,
      reasons.length ? make("ul", {className: "why", "aria-label": say("why")}, ...reasons.map(text => make("li", {}, text))) : null),
    make("div", {className: "do"}, button("click", "view"),
      make("button", {type: "button", className: "plain", onclick: () => go({like: item, filters: {}, offset: 0}, {focus: true})}, say("similar"), make("span", {className: "unseen"}, `: ${item.title}`)),
      button("cart", "cart"), button("purchase", "buy")));
}

function moved(item, before) {
  if (!before) return null;
  const was = before.get(item.item_id), by = was - item.position;
  return was === undefined ? make("p", {className: "moved"}, say("new")) : by > 0 ? make("p", {className: "moved"}, `↑ ${by}`) : null;
}

function image(item) {
  const drawn = picture(item);
  if (!item.image || /^[a-z][a-z0-9+.-]*:|^\/\//i.test(item.image)) return drawn; // nothing is asked from other places
  const shown = make("img", {src: item.image, alt: "", loading: "lazy"});
  shown.addEventListener("error", () => shown.replaceWith(drawn), {once: true});
  return shown;
}

function stars(item) {
  const full = Math.round(item.rating), value = item.rating.toLocaleString(language, {minimumFractionDigits: 1, maximumFractionDigits: 1});
  return make("p", {className: "stars"},
    make("b", {"aria-hidden": "true"}, "★".repeat(full) + "☆".repeat(5 - full)), " ",
    make("span", {}, item.n_ratings ? say("rated", {value, n: item.n_ratings.toLocaleString(language)}) : say("rated_only", {value})));
}

function showFacets() {
  const held = document.activeElement?.id;
  const chosen = name => state.filters[name] || new Map();
  const sets = FACETS.map(name => {
    const counts = new Map((state.page.facets[name] || []).map(({value, count}) => [JSON.stringify(value), {value, count}]));
    for (const [key, value] of chosen(name)) if (!counts.has(key)) counts.set(key, {value, count: null});
    const all = [...counts];
    const rows = all.filter(([key], place) => place < 8 || chosen(name).has(key));
    if (all.length < 2 && !chosen(name).size) return null;
    return make("fieldset", {}, make("legend", {}, say(name)), ...rows.map(([key, one], place) => {
      const box = make("input", {type: "checkbox", id: `f-${name}-${place}`, checked: chosen(name).has(key), onchange: () => choose(name, key, one.value, box.checked)});
      return make("label", {title: typeof one.value === "string" ? one.value : ""}, box, make("span", {}, label(name, one.value)), make("span", {className: "n"}, one.count === null ? "" : String(one.count)));
    }));
  });
  at("facets").replaceChildren(...sets.filter(Boolean));
  at("clear").hidden = !Object.values(state.filters).some(values => values.size);
  if (held?.startsWith("f-")) at(held)?.focus();
}

function label(name, value) {
  if (typeof value !== "object") return String(value).split(">").pop().trim();
  const currency = name === "price" ? state.page.items.find(item => item.currency)?.currency : null;
  const shown = number => name === "price" ? price(number, currency) : number.toLocaleString(language);
  return value.low === value.high ? shown(value.low) : `${shown(value.low)} – ${shown(value.high)}`;
}

function choose(name, key, value, on) {
  const values = state.filters[name] ||= new Map();
  if (on) values.set(key, value); else values.delete(key);
  go({offset: 0});
}

function go(change, how = {}) {
  Object.assign(state, change);
  return refresh(how);
}

// Suggestions: a combobox with a list, as the ARIA practices describe it

let hints = [], place = -1, hinting = new AbortController(), pause;

function showHints(found) {
  hints = found;
  place = -1;
  at("suggestions").replaceChildren(...hints.map((text, n) => make("li", {id: `s-${n}`, role: "option", "aria-selected": "false", onmousedown: event => { event.preventDefault(); take(text); }}, text)));
  at("suggestions").hidden = !hints.length;
  at("query").setAttribute("aria-expanded", String(hints.length > 0));
  at("query").removeAttribute("aria-activedescendant");
}

function point(to) {
  if (!hints.length) return;
  place = (to + hints.length) % hints.length;
  [...at("suggestions").children].forEach((one, n) => one.setAttribute("aria-selected", String(n === place)));
  at("query").setAttribute("aria-activedescendant", `s-${place}`);
  at(`s-${place}`).scrollIntoView({block: "nearest"});
}

function take(text) {
  clearTimeout(pause);
  hinting.abort();
  at("query").value = text;
  showHints([]);
  go({query: text.trim(), like: null, filters: {}, offset: 0});
}

async function hint() {
  hinting.abort();
  const mine = hinting = new AbortController(), prefix = at("query").value;
  if (!prefix.trim()) return showHints([]);
  try {
    const said = await ask("suggest", {prefix, k: 8}, mine.signal);
    if (mine === hinting && !mine.signal.aborted) showHints(said.suggestions);
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof No)) throw error;
  }
}

at("query").addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(hint, 120); });
at("query").addEventListener("blur", () => showHints([]));
at("query").addEventListener("keydown", event => {
  const moves = {ArrowDown: () => hints.length ? point(place + 1) : hint(), ArrowUp: () => point(place < 0 ? hints.length - 1 : place - 1)};
  if (event.isComposing) return; // Enter then ends the input of a Chinese word
  if (moves[event.key]) { event.preventDefault(); moves[event.key](); }
  if (event.key === "Escape" && hints.length) { event.preventDefault(); showHints([]); }
  if (event.key === "Enter" && place >= 0) { event.preventDefault(); take(hints[place]); }
});
at("ask").addEventListener("submit", event => { event.preventDefault(); take(at("query").value); });

// The rest of the controls

at("user").addEventListener("change", () => go({user: at("user").value, offset: 0}));
at("sort").addEventListener("change", () => go({sort: at("sort").value, offset: 0}));
at("clear").addEventListener("click", () => go({filters: {}, offset: 0}).then(() => at("narrow").querySelector("summary").focus()));
at("before").addEventListener("click", () => go({offset: Math.max(0, state.offset - SIZE)}, {focus: true}));
at("after").addEventListener("click", () => go({offset: state.offset + SIZE}, {focus: true}));
at("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  sessionStorage.setItem("language", language);
  speak();
  refresh();
});
at("enter").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value.trim());
  at("key").value = "";
  at("door").close();
  begin();
});

function speak() {
  document.documentElement.lang = language;
  for (const one of document.querySelectorAll("[data-say]")) one.textContent = say(one.dataset.say);
  for (const one of document.querySelectorAll("[data-name]")) one.setAttribute("aria-label", say(one.dataset.name));
  for (const one of document.querySelectorAll("[data-hint]")) one.placeholder = say(one.dataset.hint);
  at("language").textContent = language === "en" ? "中文" : "English";
  at("language").lang = language === "en" ? "zh" : "en";
  at("sort").replaceChildren(...SORTS.map(sort => make("option", {value: sort, selected: sort === state.sort}, say(sort ? `sort${sort}` : "sort_best"))));
  at("user").firstElementChild?.replaceChildren(say("nobody"));
}

async function begin() {
  try {
    const {users} = await ask("users");
    at("user").replaceChildren(...["", ...users].map(user => make("option", {value: user, selected: user === state.user}, user || say("nobody"))));
    await refresh();
  } catch (error) {
    if (!(error instanceof No)) throw error;
    at("wrong").textContent = error.message;
  }
}

if (matchMedia("(max-width: 45rem)").matches) at("narrow").open = false;
speak();
begin();
