// Every word of the page, in each of its languages.
export const WORDS = {
  en: {
    shop: "Shop", skip: "Skip to the results", search: "Search", hint: "What are you looking for?", suggestions: "Suggestions", whom: "Shop as", nobody: "a stranger",
    filters: "Filters", clear: "Clear all", sort: "Sort by", pages: "Pages", before: "Back", after: "Next", where: "Page {page} of {pages}",
    sort_best: "Best first", "sort-price": "Price, high first", sortprice: "Price, low first", "sort-rating": "Rating", "sort-listed_ts": "Newest",
    results: "“{query}”", like: "Like {title}", for_you: "Chosen for you", for_all: "Popular now", one: "1 product", many: "{n} products",
    category: "Category", brand: "Brand", price: "Price", rating: "Rating", rated: "{value} of 5, {n} ratings", rated_only: "{value} of 5", variants: "{n} variants", sold_out: "Sold out",
    why: "Why it is here", view: "View", cart: "Add to cart", buy: "Buy", similar: "Similar", new: "new",
    viewed: "Viewed: {title}.", carted: "In the cart: {title}.", bought: "Bought: {title}.", changed: "The page has changed in {n} places.", same: "This page stays as it was.",
    key_title: "A key is needed", key_why: "This shop is asked with a key. It was printed when the service started for the first time, and is kept in this tab only.", key: "Key", enter: "Enter",
    key_wrong: "This key is not known.", gone: "The service cannot be reached.",
  },
  zh: {
    shop: "商店", skip: "跳到搜索结果", search: "搜索", hint: "您想找什么？", suggestions: "搜索建议", whom: "购物身份", nobody: "访客",
    filters: "筛选", clear: "清除全部", sort: "排序", pages: "分页", before: "上一页", after: "下一页", where: "第 {page} 页，共 {pages} 页",
    sort_best: "综合排序", "sort-price": "价格从高到低", sortprice: "价格从低到高", "sort-rating": "评分", "sort-listed_ts": "最新上架",
    results: "“{query}”", like: "与“{title}”相似", for_you: "为您推荐", for_all: "热门商品", one: "1 件商品", many: "{n} 件商品",
    category: "类别", brand: "品牌", price: "价格", rating: "评分", rated: "{value} 分（满分 5 分），{n} 人评价", rated_only: "{value} 分（满分 5 分）", variants: "{n} 种规格", sold_out: "缺货",
    why: "推荐理由", view: "查看", cart: "加入购物车", buy: "购买", similar: "相似商品", new: "新",
    viewed: "已查看：{title}。", carted: "已加入购物车：{title}。", bought: "已购买：{title}。", changed: "页面有 {n} 处变化。", same: "页面没有变化。",
    key_title: "需要密钥", key_why: "访问本店需要密钥。密钥在服务首次启动时显示一次，只保存在当前标签页中。", key: "密钥", enter: "进入",
    key_wrong: "密钥无效。", gone: "无法连接服务。",
  },
};

