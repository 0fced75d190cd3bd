// A drawing for a product that has no picture: a shape by its category, a colour by its name.
const SHAPES = [
  [/shoe|sneaker|boot|sandal|slide|鞋|靴/i, "M12 66c0-14 2-28 4-34 6 6 13 7 18 1 6 10 18 19 34 23 14 3 20 7 20 15v3H12zM12 78h76v6H12z"],
  [/t-shirt|tee|hoodie|jacket|shirt|tops|outerwear|sweater|coat|T恤|卫衣|外套|夹克|衬衫|羽绒/i, "M34 16c4 8 28 8 32 0l22 12-8 20-10-4v42H30V44l-10 4-8-20z"],
  [/dress|skirt|裙/i, "M38 12v12c4 6 20 6 24 0V12h7v20L61 44l20 44H19l20-44-8-12V12z"],
  [/jean|legging|bottoms|trouser|pants|shorts|裤/i, "M30 12h40l6 76H58l-8-48-8 48H24z"],
  [/headphone|headset|earbud|耳机/i, "M16 60a34 34 0 0 1 68 0v18a8 8 0 0 1-8 8h-4a4 4 0 0 1-4-4V62a4 4 0 0 1 4-4h4a26 26 0 0 0-52 0h4a4 4 0 0 1 4 4v20a4 4 0 0 1-4 4h-4a8 8 0 0 1-8-8z"],
  [/watch|wearable|手表|手环/i, "M38 8h24l3 17a30 30 0 0 1 0 50l-3 17H38l-3-17a30 30 0 0 1 0-50zM50 30a20 20 0 1 0 0 40 20 20 0 0 0 0-40zm-2 8h4v11l8 5-2 4-10-6z"],
  [/charger|power bank|plug|充电/i, "M36 10h6v18h16V10h6v18h8v22a22 22 0 0 1-18 21v21h-8V71a22 22 0 0 1-18-21V28h8z"],
  [/phone|mobile|手机/i, "M34 8h32a6 6 0 0 1 6 6v72a6 6 0 0 1-6 6H34a6 6 0 0 1-6-6V14a6 6 0 0 1 6-6zm1 10v56h30V18zm15 61a4 4 0 1 0 0 8 4 4 0 0 0 0-8z"],
  [/speaker|音箱/i, "M30 8h40a6 6 0 0 1 6 6v72a6 6 0 0 1-6 6H30a6 6 0 0 1-6-6V14a6 6 0 0 1 6-6zm20 40a18 18 0 1 0 0 36 18 18 0 0 0 0-36zm0-26a8 8 0 1 0 0 16 8 8 0 0 0 0-16z"],
  [/keyboard|键盘/i, "M10 32h80v38H10zm8 8v6h8v-6zm14 0v6h8v-6zm14 0v6h8v-6zm14 0v6h8v-6zm14 0v6h8v-6zM28 56v6h44v-6z"],
  [/mice|mouse|鼠标/i, "M50 10a22 22 0 0 1 22 22v36a22 22 0 0 1-44 0V32a22 22 0 0 1 22-22zm-3 10v18h6V20z"],
  [/laptop|computer|notebook|monitor|tv|electronic|电脑|显示器/i, "M18 20h64a4 4 0 0 1 4 4v42H14V24a4 4 0 0 1 4-4zm4 8v30h56V28zM6 72h88v4a6 6 0 0 1-6 6H12a6 6 0 0 1-6-6z"],
  [/suitcase|luggage|行李|箱/i, "M38 8h24v18h10a6 6 0 0 1 6 6v48a6 6 0 0 1-6 6v6h-8v-6H36v6h-8v-6a6 6 0 0 1-6-6V32a6 6 0 0 1 6-6h10zm6 6v12h12V14zm-8 22v40h6V36zm22 0v40h6V36z"],
  [/bag|backpack|包/i, "M36 22a14 14 0 0 1 28 0v2a18 18 0 0 1 16 18v42a6 6 0 0 1-6 6H26a6 6 0 0 1-6-6V42a18 18 0 0 1 16-18zm6 1h16a8 8 0 0 0-16 0zM32 52v26h36V52z"],
  [/bottle|水杯|水瓶/i, "M42 6h16v12l8 12v56a6 6 0 0 1-6 6H40a6 6 0 0 1-6-6V30l8-12z"],
  [/pan|pot|锅/i, "M8 44h54l30-14 2 6-31 16a27 27 0 0 1-27 28 27 27 0 0 1-28-28z"],
  [/kettle|coffee|tea|cup|mug|壶|咖啡|杯/i, "M20 28h50v8h8a14 14 0 0 1 0 34h-9a20 20 0 0 1-19 16H40a20 20 0 0 1-20-20zm50 16v18h7a9 9 0 0 0 0-18z"],
  [/lamp|light|灯/i, "M36 10h28l16 40H20zM46 50h8v30h16v8H30v-8h16z"],
  [/pillow|duvet|bedding|sheet|枕|被/i, "M14 26c24 6 48 6 72 0-6 16-6 32 0 48-24-6-48-6-72 0 6-16 6-32 0-48z"],
  [/hair dryer|吹风/i, "M14 24h44a20 20 0 0 1 6 39l6 27H52l-7-26H14zm42 12a8 8 0 1 0 0 16 8 8 0 0 0 0-16z"],
  [/cream|sunscreen|skin|beauty|hair|霜|护肤|防晒/i, "M36 8h28v14H36zm-8 20h44v56a8 8 0 0 1-8 8H36a8 8 0 0 1-8-8zm8 20v20h28V48z"],
  [/tent|outdoor|帐篷/i, "M50 14l42 70H62L50 56 38 84H8z"],
  [/yoga|mat|瑜伽/i, "M12 36h60a17 17 0 1 1-12 29H12zm60 8a9 9 0 1 0 0 18 9 9 0 0 0 0-18zm0 5a4 4 0 1 1 0 8 4 4 0 0 1 0-8z"],
  [/bear|plush|soft toy|熊/i, "M26 12a14 14 0 0 1 13 9 30 30 0 0 1 22 0 14 14 0 1 1 17 19 28 28 0 0 1-8 26 24 24 0 0 1-40 0 28 28 0 0 1-8-26 14 14 0 0 1 4-28zm14 28a4 4 0 1 0 0 8 4 4 0 0 0 0-8zm20 0a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM50 52c-6 0-9 3-9 6s4 7 9 7 9-4 9-7-3-6-9-6z"],
  [/toy|block|brick|积木|玩具/i, "M14 34h10v-8h16v8h20v-8h16v8h10v44H14z"],
  [/hat|cap|帽/i, "M30 58c0-26 6-36 20-36s20 10 20 36c14 1 22 4 22 8 0 8-84 8-84 0 0-4 8-7 22-8z"],
];
const OTHER = "M50 8l38 18v48L50 92 12 74V26zm0 9L25 29l25 11 25-11zM20 36v33l26 12V47zm60 0L54 47v34l26-12z";
const COLOURS = [
  [/\b(black|ebony|jet)\b|黑/i, "#3a3f44"], [/\b(white|ivory|snow)\b|白/i, "#fbfaf5"], [/\b(gr[ae]y|silver|slate)\b|灰|银/i, "#9aa3a9"], [/\b(crimson|scarlet|red)\b|红/i, "#c8372d"], [/\b(navy)\b|藏青/i, "#2b3f73"],
  [/\b(blue|azure)\b|蓝/i, "#3b78c4"], [/\b(green|olive|emerald)\b|绿/i, "#3f8f58"], [/\b(yellow|lemon|gold)\b|黄|金/i, "#e2b33c"], [/\b(orange)\b|橙/i, "#e0812f"], [/\b(pink|rose)\b|粉/i, "#e08aa8"],
  [/\b(purple|violet|lilac)\b|紫/i, "#8a63b8"], [/\b(brown|tan|chestnut)\b|棕|褐|咖/i, "#8b5e3c"], [/\b(beige|sand|cream)\b|米/i, "#d8c3a0"],
];
const OTHERS = ["#5b8c9a", "#9a7a5b", "#7a8f5a", "#8a6f96", "#a06a6a", "#5f7fa8"];

function svg(tag, facts, ...inside) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

export function picture(item) {
  const kind = (item.category || "").split(">").map(part => part.trim()).reverse();
  const found = [...kind, item.title].map(text => SHAPES.find(([words]) => words.test(text))).find(Boolean);
  const seed = [...(item.brand || item.item_id)].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7);
  const colour = COLOURS.find(([words]) => words.test(item.title))?.[1] || OTHERS[seed % OTHERS.length];
  const shape = svg("path", {d: found ? found[1] : OTHER, fill: colour, "fill-rule": "evenodd", stroke: "#0005", "stroke-width": 1.5, "stroke-linejoin": "round"});
  return svg("svg", {viewBox: "0 0 100 100", "aria-hidden": "true", focusable: "false"}, shape);
}
